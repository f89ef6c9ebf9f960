"""The text-to-action corpus of stage I: planned arm motions that an instruction fully describes, without pictures."""
