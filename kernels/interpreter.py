"""Triton's interpreter with NumPy 2.4: loop bounds are arrays of one element, not yet numbers."""

from triton.runtime import interpreter


def accept_loop_bounds() -> None:
    """Let `range` take tensors of one element in interpreted kernels.

    Triton 3.6 turns them into numbers with int(array), which NumPy from 2.4 on refuses.
    """
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor
