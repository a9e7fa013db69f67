"""The array types that messages are made of."""

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
UInt16 = npt.NDArray[np.uint16]
Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]


def no_ids() -> Int32:
    """Return an empty array of token ids."""
    return np.empty(0, dtype=np.int32)


def no_flags() -> Bool:
    """Return an empty array of flags."""
    return np.empty(0, dtype=np.bool_)
