"""Variable-length flash attention against exact blocks of similar length."""

import pytest
import torch

from workers.learner.attention import PackedLayout, packed_attention

pytestmark = pytest.mark.gpu

_LENGTHS = [7, 1, 30, 6, 6, 29, 2]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_flash_attention_says_what_blocks_say(window: int | None, num_kv_heads: int) -> None:
    states = [
        torch.randn(1, heads, sum(_LENGTHS), 64, device="cuda", dtype=torch.bfloat16)
        for heads in (4, num_kv_heads, num_kv_heads)
    ]
    layout = PackedLayout.of(_LENGTHS, device=torch.device("cuda"))
    given, _ = packed_attention(None, *states, None, packing=layout, sliding_window=window)
    exact = [of_kind.float() for of_kind in states]
    expected, _ = packed_attention(None, *exact, None, packing=layout, sliding_window=window)
    torch.testing.assert_close(given.float(), expected, atol=0.02, rtol=0.02)
