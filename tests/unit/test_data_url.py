"""Audio inside JSON: what is read, and that nothing is ever fetched or opened."""

from __future__ import annotations

import base64

import pytest

from serve_app.errors import BodyTooLarge, FeatureDisabled, InvalidValue
from serve_app.ingress.data_url import audio_of, encoded_length


@pytest.mark.parametrize("size", range(7))
def test_encoded_length(size: int) -> None:
    assert encoded_length(size) == len(base64.b64encode(b"x" * size))


@pytest.mark.parametrize(
    "head",
    ["data:audio/wav;base64", "DATA:Audio/WAV;BASE64", "data:;base64", "data:audio/ogg;codecs=opus;base64"],
)
def test_reads_base64(head: str) -> None:
    assert audio_of(f"{head},AAEC", 3, param="ref_audio") == b"\0\1\2"


def test_is_refused_by_its_length_before_it_is_decoded() -> None:
    # Not base64 at all: the length is looked at first.
    with pytest.raises(BodyTooLarge):
        audio_of("data:;base64," + "!" * 5, 3, param="ref_audio")


@pytest.mark.parametrize(
    "url", ["data:,x", "data:audio/wav,AAEC", "data:image/png;base64,AAEC", "data:;base64,A"]
)
def test_what_is_no_audio_is_refused(url: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        audio_of(url, 100, param="ref_audio")
    assert refused.value.param == "ref_audio"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "https://a.example/a.wav", "", "AAEC"])
def test_nothing_is_fetched(url: str) -> None:
    with pytest.raises(FeatureDisabled) as refused:
        audio_of(url, 100, param="ref_audio")
    assert "passwd" not in refused.value.message
