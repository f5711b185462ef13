"""The TFDS dataset ``text_corpus``: text or conversations of this project's sources as array_record."""
