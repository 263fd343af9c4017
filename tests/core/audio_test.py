"""Audio files hold their tags."""

import io

import numpy as np
import pytest
import soundfile

from musicrl_jax.core import audio


@pytest.mark.parametrize("form", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("title", ["\0", "\0{", "a\0b"])
def test_a_tag_with_nul_bytes_is_written(form, title):
    """A NUL byte ends a C string, and libsndfile refuses an empty one."""
    tags = {"title": title, "comment": "seed 1"}
    content = audio.encode(np.zeros(100, np.float32), 16_000, form, tags)
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        assert (file.title, file.comment) == (title.replace("\0", " "), "seed 1")
