from config_files import refusal

from opd_ray.preflight.finding import error, ok, warning, warnings_of


def test_red_becomes_one_line_and_yellow_a_list():
    findings = [ok("a", "good"), warning("b", "odd", "change b")]
    assert warnings_of(findings) == ["b: odd; to change it: change b"]
    words = refusal(lambda: warnings_of([*findings, error("c", "bad", "change c")]))
    assert words == "c: bad; to change it: change c"
