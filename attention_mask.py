"""The Transfusion attention mask: who may look at whom (paper, section 3, "Transfusion attention", figure 4).

Text is read causally, an image all at once. A position may attend to every earlier position of its
document. A patch may also attend to the later patches of its own image, unless `causal` is asked for. <BOI>
and <EOI> are text, outside the image's block. Nothing sees another document packed into the same row.
Padding sees only itself: a row of the mask that is all False would turn softmax into NaN.

Exports `mask_rule`, the rule in the form that FlexAttention takes; `transfusion_mask`, a dense mask, the
reference everywhere; `flex_mask`, FlexAttention's block mask (Dong et al. 2024), for training on CUDA.
"""

from functools import cache

import torch
from torch.nn.attention.flex_attention import create_block_mask

TEXT = -1  # image_id of a position that belongs to no image
PADDING = -1  # doc_id of a position that belongs to no document


def mask_rule(image_id, doc_id, causal=False):
    """The mask as a function of four indices, `rule(b, h, q, k) -> bool`: may q of row b attend to k?

    image_id: (B, S) int, the image that a patch belongs to (unique within the row), -1 for text.
    doc_id:   (B, S) int, the number of the document that a position belongs to, -1 for padding.
    causal:   inside an image, too: it is then read like text (section 4.3's ablation, and Chameleon).
    The head index h plays no part; the signature is the `mask_mod` of FlexAttention's `create_block_mask`.
    """
    if causal:
        image_id = torch.full_like(image_id, TEXT)

    def rule(b, h, q, k):
        same_image = (image_id[b, q] == image_id[b, k]) & (image_id[b, q] != TEXT)
        same_document = (doc_id[b, q] == doc_id[b, k]) & (doc_id[b, q] != PADDING)
        return (q == k) | (same_document & ((q >= k) | same_image))

    return rule


def transfusion_mask(image_id, doc_id=None, causal=False):
    """The rule at every (query, key): (B, S), (B, S) -> bool (B, 1, S, S), True = may attend.

    Without doc_id each row is one document.
    """
    if doc_id is None:
        doc_id = torch.zeros_like(image_id)
    batch, length = image_id.shape
    b = torch.arange(batch, device=image_id.device)[:, None, None, None]
    position = torch.arange(length, device=image_id.device)
    return mask_rule(image_id, doc_id, causal)(b, None, position[:, None], position[None, :])


@cache
def compiled_create_block_mask():
    """Uncompiled, it would write out all S x S entries. Loading the compiler takes seconds: not before."""
    return torch.compile(create_block_mask)


def flex_mask(image_id, doc_id, causal=False):
    """The rule as a BlockMask for flex_attention: (B, S), (B, S) -> which blocks are empty, full or mixed.

    S should be a multiple of 128, and the same from batch to batch: one compilation then serves them all.
    """
    create = compiled_create_block_mask() if image_id.is_cuda else create_block_mask
    batch, length = image_id.shape
    rule = mask_rule(image_id, doc_id, causal)
    return create(rule, batch, None, length, length, device=image_id.device.type)


if __name__ == "__main__":
    from PIL import Image

    # In one row: "a red dot <BOI> 4 patches <EOI>", "<BOI> 4 patches <EOI> a dot", and some padding.
    names = ["a", "red", "dot", "BOI", *["#"] * 4, "EOI", "BOI", *["#"] * 4, "EOI", "a", "dot", "pad", "pad"]
    image_id = torch.tensor([[-1] * 4 + [0] * 4 + [-1] * 2 + [1] * 4 + [-1] * 5])
    doc_id = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 2])
    mask = transfusion_mask(image_id, doc_id)[0, 0]
    for name, row in zip(names, mask):
        print(f"{name:>4} " + " ".join("■" if allowed else "·" for allowed in row))
    colours = torch.tensor([[238, 238, 238], [60, 60, 70], [66, 120, 220]], dtype=torch.uint8)
    picture = colours[mask.long() * (1 + (image_id[0] != TEXT).long()[:, None])]  # rows of patches are blue
    cells = picture.repeat_interleave(24, 0).repeat_interleave(24, 1).numpy()
    cells[::24], cells[:, ::24] = 255, 255  # a white grid between the cells
    Image.fromarray(cells).save("attention_mask.png")
    print("rows: who looks; columns: at whom; ■ = may attend; # = patch. Wrote attention_mask.png")
