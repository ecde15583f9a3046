"""The image root: which kind of place IMAGE_ROOT_DIR names."""

from pathlib import Path

from pipeline.photos.files import RETRY_S, PhotoFolder, Photos
from pipeline.stage.settings import Settings, is_url


def photos_at(root: Path | str, chosen: Settings, patient: bool = True) -> Photos:
    """The photos below a folder, or below a URL in an object store.

    `patient`: what fails is asked again, for a minute at most. SettingsError: as PhotoStore.
    """
    if is_url(str(root)):
        from pipeline.photos.objects import PhotoStore

        return PhotoStore(str(root), chosen.max_image_bytes, patient)
    pauses = RETRY_S if patient else ()
    return PhotoFolder(Path(root), chosen.follow_symlinks, chosen.max_image_bytes, pauses)
