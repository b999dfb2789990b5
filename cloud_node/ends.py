"""The ends of a model as a signed bundle: made once per cut, kept in a cache, served to edges.

Knows model files and bundles; knows no sessions and no wire.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        folder = Path(scratch) / "bundle"
        _fill(folder, model, cut)
        bundle.write(folder, "ends", model_digest, str(cut), {}, key or Ed25519PrivateKey.generate())
        if not place.is_dir():
            folder.rename(place)
    return place


def _fill(folder: Path, model: Path, cut: Cut) -> None:
    folder.mkdir()
    ends, found = load_ends(model, cut, "auto")  # in the checkpoint's own dtype, so that nothing is lost
    save_weights(ends, model, folder, without=found.new)
