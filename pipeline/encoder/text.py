"""Words to a vector in the space of the photos, by the model's text tower."""

import numpy as np
import numpy.typing as npt

from pipeline.encoder.model import Model
from pipeline.stage.errors import ModelError


def encode_text(model: Model, words: str) -> npt.NDArray[np.float32]:
    """The unit vector, float32 (dim,), of a text; on the CPU in fp32.

    ModelError: the model has no text tower that its tokenizer's words fit, or no direction.
    """
    import open_clip
    import torch

    from pipeline.encoder.tower import load_clip, quiet

    clip, _ = load_clip(model)
    try:
        with quiet():
            tokens = open_clip.get_tokenizer(model.name)([words])
    except Exception as error:  # noqa: BLE001  a tokenizer may come from a hub
        raise ModelError(
            f"the tokenizer of {model.model_rev}", " ".join(str(error).split()) or "none"
        ) from None
    known = getattr(getattr(clip, "token_embedding", None), "num_embeddings", None)
    if known is not None and int(tokens.max()) >= known:
        raise ModelError(
            "a model with a text tower", f"one of {known} words, for show", model.model_rev,
            "search by LISTING_ID or --image",
        )  # fmt: skip
    with torch.inference_mode():
        vector = clip.encode_text(tokens, normalize=True)[0].float().numpy()
    if not np.isfinite(vector).all():
        raise ModelError("a text with a direction", "a vector of zeros", repr(words))
    found: npt.NDArray[np.float32] = vector
    return found
