"""The ends of a model as a signed bundle: made once per cut, kept in a cache, served to edges.

Knows model files and bundles; knows no sessions and no wire.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError

from isthmus import bundle
from isthmus.cut import Cut
from isthmus.errors import BundleError
from isthmus.load import load_ends
from isthmus.weights import save_weights


def ends_bundle(model: Path, model_digest: str, cut: Cut, key: Ed25519PrivateKey | None, cache: Path) -> Path:
    """The folder of the ends' bundle, made if the cache lacks it or holds a damaged one.

    Each signer has folders of its own: another node may be serving from the same cache. Without a key, where no edge
    checks who signed, any signature will do.

    Raises:
        CutError, ModelError: the model cannot be cut so.
        BundleError: the cache cannot be written.
    """
    signer = "plain" if key is None else hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()[:16]
    place = cache / "ends" / f"{model_digest[:32]}-{cut.bottom}-{cut.top}-{signer}"
    if place.is_dir():
        try:
            bundle.verify(place, None if key is None else key.public_key())
        except BundleError:
            shutil.rmtree(place)
        else:
            return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            folder = Path(scratch) / "bundle"
            _fill(folder, model, cut)
            bundle.write(folder, "ends", model_digest, str(cut), {}, key or Ed25519PrivateKey.generate())
            if not place.is_dir():
                folder.rename(place)
    except (OSError, SafetensorError) as error:  # the second is how a full disk is told of while weights are written
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(
            f"the ends cannot be written to {cache} ({reason}): make room there, or set ISTHMUS_CACHE to another folder"
        ) from None
    return place


def _fill(folder: Path, model: Path, cut: Cut) -> None:
    folder.mkdir()
    ends, found = load_ends(model, cut, "auto")  # in the checkpoint's own dtype, so that nothing is lost
    save_weights(ends, model, folder, without=found.new)
