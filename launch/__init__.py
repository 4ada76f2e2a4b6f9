"""The command line: ``rankload demo``, also ``python -m rankload.launch demo``."""
