"""What can go wrong with a score, told apart by who must act."""


class BadScore(ValueError):
    """One group cannot be scored; the teacher goes on with the others."""


class TeacherDown(RuntimeError):
    """No replica of the teacher answers any more; no group can be scored."""
