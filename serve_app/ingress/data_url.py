"""Audio inside a JSON body: ``data:audio/wav;base64,…``. Nothing else is ever fetched or opened."""

from __future__ import annotations

import base64
import binascii

from serve_app.errors import BodyTooLarge, FeatureDisabled, InvalidValue

#: Sent by browsers and recorders for audio, whatever is inside; the content decides.
_MEDIA_TYPES = ("audio/", "video/webm", "video/mp4", "application/octet-stream", "application/ogg")


def encoded_length(size_bytes: int) -> int:
    """Characters that base64 makes of ``size_bytes``."""
    return 4 * -(-size_bytes // 3)


def audio_of(url: str, max_bytes: int, *, param: str) -> bytes:
    """The bytes in a base64 ``data:`` URL.

    Raises:
        FeatureDisabled: Any other kind of URL, or a path.
        InvalidValue: Not base64, or not declared as audio.
        BodyTooLarge: More than ``max_bytes``; found out before anything is decoded.
    """
    head, comma, data = url.partition(",")
    if not head[:5].lower() == "data:":
        raise FeatureDisabled(
            f"'{param}' is read from the request only, never from a URL or a path. "
            "Send the recording itself: data:audio/wav;base64,…",
            param=param,
        )
    media_type, *parameters = head[5:].lower().split(";")
    if not comma or "base64" not in (parameter.strip() for parameter in parameters):
        raise InvalidValue(f"'{param}' is no base64 data URL. Send data:audio/wav;base64,…", param=param)
    if media_type and not media_type.startswith(_MEDIA_TYPES):
        raise InvalidValue(f"'{param}' is not declared as audio. Send data:audio/wav;base64,…", param=param)
    if len(data) > encoded_length(max_bytes):
        raise BodyTooLarge(f"'{param}' is larger than {max_bytes} bytes. Send less.", param=param)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidValue(
            f"'{param}' is not valid base64. Send data:audio/wav;base64,…", param=param
        ) from error
