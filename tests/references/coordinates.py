"""The sets of coordinates of the SANER paper, slow and obvious: one coordinate at a time, in Python."""


def set_of(clean, perturbed):
    """``"A"`` for r >= 1, ``"B"`` for 0 < r < 1, ``"C"`` otherwise, with r = perturbed / clean."""
    clean, perturbed = float(clean), float(perturbed)
    if 0 < perturbed < clean or clean < perturbed < 0:
        return "B"
    if perturbed >= clean > 0 or perturbed <= clean < 0:
        return "A"
    return "C"


def down_weighted(clean, perturbed, alpha):
    """``(1 - alpha) perturbed`` in set B, ``perturbed`` elsewhere."""
    return [
        (1 - alpha) * float(p) if set_of(c, p) == "B" else float(p)
        for c, p in zip(clean, perturbed, strict=True)
    ]
