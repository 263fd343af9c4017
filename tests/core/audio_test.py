"""Sound as the content of a file."""

import io

import numpy as np
import pytest
import soundfile

from musicrl_jax.core import audio


@pytest.mark.parametrize("form", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("title", ["\0", "\0{", "a\0b"])
def test_a_text_with_zero_bytes_is_kept(form, title):
    """A C string ends at one, and libsndfile refuses an empty text: such a prompt was an error of the service."""
    content = audio.encode(
        np.zeros(100, np.float32), 16_000, form, {"title": title, "comment": "seed 1"}
    )
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        assert (file.title, file.comment) == (title.replace("\0", " "), "seed 1")
