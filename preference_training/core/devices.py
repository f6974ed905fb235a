"""The device that computes, and its precision."""


def allow_tf32(allow: bool) -> None:
    """Set whether CUDA's float32 matrix products may use TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def pick_device():
    """The `torch.device` to compute on: cuda, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        # With its index, as tensors have it.
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
