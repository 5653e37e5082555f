"""The genuine TensorRT-RTX bindings, with a runtime that does what a plan of the tests says. For a search path.

Such a plan is text: a verb, then lines that are logged as errors first, separated by ``|``. Any other plan goes to the
genuine runtime.
"""

import ctypes
import importlib
import os
import signal
import sys
import time

here = os.path.dirname(__file__)  # noqa: PTH120
place = sys.path.index(here)
sys.path.remove(here)
del sys.modules[__name__]
rtx = importlib.import_module(__name__)
sys.path.insert(place, here)
Genuine = rtx.Runtime


class Runtime(Genuine):
    def __init__(self, logger):
        Genuine.__init__(self, logger)
        self.said_to = logger

    def deserialize_cuda_engine(self, plan):
        verb, *lines = bytes(plan).decode(errors="replace").split("|")
        if not hasattr(self, f"do_{verb}"):
            return Genuine.deserialize_cuda_engine(self, plan)
        for line in lines:
            self.said_to.log(rtx.ILogger.ERROR, line)
        return getattr(self, f"do_{verb}")()

    def do_engine(self):
        return "an engine"

    def do_none(self):
        self.said_to.log(rtx.ILogger.WARNING, "a warning")

    def do_raise(self):
        raise RuntimeError("out of luck")

    def do_memory(self):
        raise MemoryError

    def do_crash(self):
        ctypes.string_at(0)

    def do_badalloc(self):
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.abort()

    def do_hang(self):
        with open("/proc/self/comm", "w") as name:  # noqa: PTH123
            name.write("hangs")
        time.sleep(1000)

    def do_kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def do_exit(self):
        print("last words", flush=True)
        os._exit(3)

    def do_tell(self):
        self.said_to.log(rtx.ILogger.ERROR, f"visible: {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        self.said_to.log(rtx.ILogger.ERROR, f"host code: {self.engine_host_code_allowed}")
        self.said_to.log(rtx.ILogger.ERROR, f"folder: {os.getcwd()}")  # noqa: PTH109


rtx.Runtime = Runtime
