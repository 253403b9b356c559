"""Machine code that calls nothing but itself.

numba gives a compiled function copies of all that it calls, each of which LLVM optimises once more in it. A copy that is not
inlined is called by its name, and of several definitions of a name the process takes the one that it met first. A name has a
count of what its process compiled, and nothing of the constants that its function was made with. So a kernel from the disk
might call a function for another head_dim, another kernel's; and a process that compiles calls functions that were optimised
once, with sums in another order than in the kernel's own copies. Here a kernel's copies have no names that others see.
"""

from __future__ import annotations

from typing import Any

from llvmlite.binding import Linkage
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _Library(JITCodeLibrary):
    def _optimize_final_module(self) -> None:
        super()._optimize_final_module()
        for function in self._final_module.functions:
            if function.linkage is Linkage.linkonce_odr:  # a copy; the kernel and its ways in from Python are external
                function.linkage = Linkage.internal


class Alone(Compiler):
    """numba's compiler of a function that is kept on disk."""

    def define_pipelines(self) -> Any:
        self.state.library = _Library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        self.state.library.enable_object_caching()
        return super().define_pipelines()
