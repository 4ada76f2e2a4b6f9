"""The command line: ``rankload COMMAND``, also ``python -m rankload COMMAND``.

`cli.main` parses the arguments and calls the command, a module of `commands`. `demo.demo` shows a restore on this
machine's CPU:

1. `demo_train` under torchrun (`children`): 4 ranks train `demo_model`, save, and train on.
2. `demo_server`, a process of its own, serves the checkpoint over HTTP and counts the bytes.
3. `demo_train` again: 4 fresh ranks restore from that server and train on.
4. The losses of both runs, the traffic and the receipt are printed; the exit code is 1 where anything differs.
5. `demo_fixture`, without DeepSpeed and in a checkout only: weights that Composer wrote are restored.

Not guaranteed: that the demo uses DeepSpeed, which a plain DDP module replaces where it can't be imported; nor that
what is killed with SIGKILL ends its children. Nothing here is public but the command line.

May import `rankload.loader` and `rankload.distributed`. ``cli``, ``commands`` and ``demo`` import no torch; the
ranks' modules do.
"""
