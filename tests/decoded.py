"""What decoding makes of a file, for tests."""

from __future__ import annotations

from typing import Any

import pytest

from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans.decode import frames, read_instance, require_image, stored_frames
from scanloom.scans.image import ScanImage


def images(data: bytes, **rules: Any) -> list[ScanImage]:
    """Every frame of a DICOM file; raises the ScanError of the file or of its first bad frame."""
    wanted = Decode.model_validate(rules)
    instance = read_instance(data, wanted)
    require_image(instance)
    made = []
    for frame in frames(instance, wanted):
        if isinstance(frame, ScanError):
            raise frame
        made.append(frame)
    return made


def image(data: bytes, **rules: Any) -> ScanImage:
    """The one frame of a DICOM file."""
    (only,) = images(data, **rules)
    return only


def refusal(data: bytes, **rules: Any) -> tuple[str, str]:
    """Code and tag of why a DICOM file is refused."""
    with pytest.raises(ScanError) as caught:
        images(data, **rules)
    return caught.value.code, caught.value.tag


def stored(data: bytes) -> list[Any]:
    """Stored values of every frame of a DICOM file."""
    made = []
    for frame in stored_frames(read_instance(data, Decode())):
        if isinstance(frame, ScanError):
            raise frame
        made.append(frame.samples)
    return made
