"""What JAX's errors mean."""


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that the device's memory is full, as XLA words it."""
    return "RESOURCE_EXHAUSTED" in str(error)
