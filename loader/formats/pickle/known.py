"""Lists the classes and functions that real checkpoints hold, by name: the allow-list. Free of torch.

Nothing on it is imported or called to read a file. A name is on the list because its pickled fields mean something to a
restore and are plain values. `build` makes what a call of it stands for, `materialize.objects` what the finished tree
holds. A name off the list is kept as unknown; `materialize.safe_types.require_safe` refuses it.
"""

from __future__ import annotations

from ...saved.dtypes import ITEMSIZE, QUANTIZED_STORAGE, STORAGE_DTYPE

DTYPES: dict[str, str] = {f"torch.{name}": name for name in ITEMSIZE}
"""``torch.float32`` to ``float32``."""

STORAGES: dict[str, str] = {f"torch.{name}": dtype for name, dtype in STORAGE_DTYPE.items()} | {
    "torch.storage.UntypedStorage": "uint8",
}
"""Storage classes to the names of their element types."""

QUANTIZED_STORAGES: dict[str, tuple[str, str]] = {
    f"torch.{name}": dtypes for name, dtypes in QUANTIZED_STORAGE.items()
}

TENSOR_CLASSES = frozenset(
    {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch._tensor.Tensor"}
)

PLAIN_TYPES = frozenset(
    f"builtins.{name}"
    for name in ("int", "float", "str", "bool", "bytes", "complex", "list", "dict", "tuple", "set", "object")
) | {"typing.Any"}
"""Classes that may be values of a tree themselves, as a defaultdict's factory is."""

NUMPY_TYPES = frozenset(
    f"numpy.{name}"
    for name in (
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
        *("float16", "float32", "float64", "complex64", "complex128", "bool", "bool_", "ndarray", "dtype"),
    )
)

BIT_GENERATORS = frozenset({"MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"})

NUMPY_RANDOM = frozenset(
    {
        "numpy.random._pickle.__randomstate_ctor",
        "numpy.random._pickle.__generator_ctor",
        "numpy.random._pickle.__bit_generator_ctor",
        "numpy.random.bit_generator.SeedSequence",
        "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
        "numpy.random._bit_generator.SeedSequence",
        *(f"numpy.random._{name.lower()}.{name}" for name in BIT_GENERATORS),
        "numpy.random._pcg64.PCG64DXSM",
    }
)

ENUMS = frozenset({"deepspeed.runtime.zero.config.ZeroStageEnum"})
"""Enumerations whose members become their plain values."""

DEEPSPEED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaleConfig",
        "deepspeed.runtime.fp16.loss_scaler.LossScaleProfile",
        "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
        "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
        "deepspeed.runtime.zero.partition_parameters.ZeroParamStatus",
        "deepspeed.runtime.zero.partition_parameters.ZeroParamType",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.utils.tensor_fragment.tensor_fragment",
    }
)

COMPOSER = frozenset(
    f"composer.core.{name}"
    for name in ("time.TimeUnit", "time.Time", "time.Timestamp", "precision.Precision", "event.Event")
)

ATTRIBUTE_DICT = "lightning.fabric.utilities.data.AttributeDict"
LIGHTNING = frozenset(
    {
        ATTRIBUTE_DICT,
        "lightning.pytorch.trainer.states.TrainerFn",
        "pytorch_lightning.trainer.states.TrainerFn",
    }
)

OWN_FUNCTIONS = frozenset(
    f"torch.optim.lr_scheduler.OneCycleLR.{name}" for name in ("_annealing_cos", "_annealing_linear")
)
"""Functions that an object saved as attributes of its own, and that the job's object has itself.

Torch before 2.4 put OneCycleLR's into its state. A dict that is made real leaves such entries out.
"""

STANDARD = frozenset(
    {
        "argparse.Namespace",
        "types.SimpleNamespace",
        "builtins.range",
        "builtins.slice",
        "_io.BytesIO",
        "collections.deque",
        *(
            f"pathlib.{name}"
            for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
        ),
        "torch.device",
        "torch.serialization._get_layout",
    }
)
"""Kept as inert objects by the unpickler, and made real by `materialize.objects`."""

KNOWN_OBJECTS: frozenset[str] = (
    STANDARD | OWN_FUNCTIONS | NUMPY_RANDOM | ENUMS | DEEPSPEED | COMPOSER | LIGHTNING | {"numpy.dtype"}
)
"""Classes whose objects are kept as `InertObject` with ``known=True``."""

KNOWN_VALUES: frozenset[str] = (
    KNOWN_OBJECTS
    | PLAIN_TYPES
    | NUMPY_TYPES
    | TENSOR_CLASSES
    | frozenset(DTYPES)
    | frozenset(STORAGES)
    | {"torch.Size", "collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
)
"""Names that may be values of a tree themselves, without a call."""

_SPELLINGS = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    "pathlib._local": "pathlib",
    "torch.tensor": "torch._tensor",
    "torch.cuda": "torch",
    "pytorch_lightning.utilities.parsing": "lightning.fabric.utilities.data",
    "lightning.pytorch.utilities.parsing": "lightning.fabric.utilities.data",
    "lightning_fabric.utilities.data": "lightning.fabric.utilities.data",
}

_PYTHON_2_NAMES = {"xrange": "range", "unicode": "str", "long": "int"}


def canonical(module: str, name: str) -> str:
    """``module.name`` as it is spelt today, for names that have moved since an older Python, NumPy or Lightning."""
    if module == "torch.cuda" and name not in STORAGE_DTYPE and name not in QUANTIZED_STORAGE:
        return f"{module}.{name}"
    if module == "__builtin__":
        name = _PYTHON_2_NAMES.get(name, name)
    return f"{_SPELLINGS.get(module, module)}.{name}"
