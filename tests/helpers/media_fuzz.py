"""Broken media files: mutations of real ones, and what preparing them comes to."""

from hypothesis import strategies as st

from gemma4_jax.errors import MediaError


@st.composite
def mutated(draw, files, head=400):
    """One of ``files`` (name -> bytes) with up to eight of its first bytes changed and its end cut off somewhere."""
    data = bytearray(files[draw(st.sampled_from(sorted(files)))])
    for _ in range(draw(st.integers(1, 8))):
        data[draw(st.integers(0, min(len(data), head) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))])


def outcome(prepare, *args, **options):
    """(what ``prepare`` gives, None), or (None, the message of its MediaError)."""
    try:
        return prepare(*args, **options), None
    except MediaError as error:
        return None, str(error)
