"""The look of a report, light and dark; nothing is loaded from anywhere."""

from html import escape

STYLE = """
:root{color-scheme:light dark;--fg:#1c1e21;--bg:#fff;--soft:#5b6270;--line:#d8dbe0;--band:#f3f4f7;--card:#fff;
--generate:#3b76c4;--score:#b3701c;--learn:#2f8550;--publish:#a1549b;--less:#d1495b;--more:#3b76c4}
@media (prefers-color-scheme:dark){:root{--fg:#e4e6ea;--bg:#15171b;--soft:#a3abb8;--line:#363a42;--band:#1e2127;
--card:#23262d;--generate:#6ea3ea;--score:#e5a85c;--learn:#66c088;--publish:#cc86c6;--less:#f07585;--more:#6ea3ea}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1060px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .3rem}h4{font-size:.9rem;margin:1.2rem 0 .3rem;color:var(--soft)}
p{margin:.3rem 0;color:var(--soft)}
table{border-collapse:collapse}td,th{padding:.2rem .9rem .2rem 0;text-align:left;font-weight:normal;vertical-align:top}
th{color:var(--soft)}td:not(:first-child),th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
table.texts td,table.texts th{text-align:left}tr+tr td{border-top:1px solid var(--line)}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:1rem}
figure{margin:0}figcaption{color:var(--soft);font-size:.85rem}svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--line)}.curve{fill:none;stroke-width:1.6}
.dot{fill:var(--generate)}.s0{stroke:#3b76c4;--c:#3b76c4}.s1{stroke:#d1751f;--c:#d1751f}.s2{stroke:#3f9a5f;--c:#3f9a5f}
.s3{stroke:#c0567f;--c:#c0567f}.s4{stroke:#8a6fc9;--c:#8a6fc9}.s5{stroke:#8c7a3d;--c:#8c7a3d}
.s6{stroke:#2e9ba6;--c:#2e9ba6}.s7{stroke:#7f8692;--c:#7f8692}
.diagonal{stroke:var(--soft);stroke-dasharray:4 3;fill:none}.band{fill:var(--generate);opacity:.22}
circle.below{fill:var(--less);opacity:.55}circle.above{fill:var(--more);opacity:.55}
.window{fill:var(--band);stroke:var(--line)}.wide{overflow-x:auto}.wide svg{min-width:700px}
.generate{fill:var(--generate);background:var(--generate)}.score{fill:var(--score);background:var(--score)}
.learn{fill:var(--learn);background:var(--learn)}.publish{fill:var(--publish);background:var(--publish)}
.key{margin-right:1rem;color:var(--soft);font-size:.85rem}.key i{display:inline-block;width:.8em;height:.8em;
margin-right:.35em;border-radius:2px}.key i.series{background:var(--c)}
pre{overflow-x:auto;background:var(--band);padding:1rem;font-size:13px}
.hint{border-left:3px solid var(--score);padding-left:.8rem;color:var(--fg)}
.trace{background:var(--band);padding:.7rem .9rem;margin:.5rem 0;font:13px/1.9 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere;border-radius:4px}.prompt{color:var(--soft)}
.trace{position:relative}.token{border-radius:2px;padding:1px 0;color:var(--fg)}
.token.below{background:color-mix(in srgb,var(--less) var(--strength),transparent)}
.token.above{background:color-mix(in srgb,var(--more) var(--strength),transparent)}
.tip{display:none;position:absolute;margin-top:1.8em;left:.9rem;z-index:2;width:max-content;
max-width:calc(100% - 1.8rem);white-space:normal;background:var(--card);color:var(--fg);
border:1px solid var(--line);border-radius:4px;padding:.4rem .6rem;font:12px/1.5 system-ui,
sans-serif;box-shadow:0 2px 8px #0004}
.token:hover,.token:focus{outline:1px solid var(--soft)}
.token:hover .tip,.token:focus .tip{display:block}.legend .token{padding:.1rem .4rem}
"""


def page(title: str, body: str) -> str:
    """Return a whole page; the body is HTML, the title is not."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} - opd-ray</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
