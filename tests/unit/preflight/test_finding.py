from config_files import refusal

from opd_ray.preflight.finding import GIB, error, ok, size, warning, warnings_of


def test_red_becomes_one_line_and_yellow_a_list():
    findings = [ok("a", "good"), warning("b", "odd", "change b")]
    assert warnings_of(findings) == ["b: odd; to change it: change b"]
    words = refusal(lambda: warnings_of([*findings, error("c", "bad", "change c")]))
    assert words == "c: bad; to change it: change c"


def test_sizes_are_said_in_the_largest_unit_that_fits():
    assert [size(n) for n in (0, 1000, 3 << 19, 40 * GIB)] == ["0 bytes", "1,000 bytes", "1.5 MiB", "40.0 GiB"]
