"""The device that computes, and how."""


def allow_tf32(allow: bool) -> None:
    """Whether CUDA's float32 products may use TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def pick_device():
    """The `torch.device` that computes: cuda, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        # With its number, as tensors say where they are.
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
