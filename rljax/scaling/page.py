"""What the pages of runs and sweeps are made of: HTML that needs nothing else, readable on a phone, light or dark.

What a model wrote is hostile text: everything is escaped, and a page's own policy forbids scripts and requests.
"""

import html
from collections.abc import Iterable, Sequence


def document(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}</main></body></html>\n"
    )


def section(title: str, body: str, kind: str = "") -> str:
    return f'<section><h2>{escape(title)}</h2><div class="{kind}">{body}</div></section>\n' if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are escaped; the first column is text, the others numbers."""
    line = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line}</tr></thead><tbody>{body}</tbody></table></div>'


def escape(text: str) -> str:
    """HTML of the text. Control characters, which HTML forbids, become their Unicode pictures."""
    return html.escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text))


STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1c1e21;--soft:#666b73;--rule:#e3e4e6;
--c0:#2563c9;--c1:#b4570b;--c2:#1b7f4d;--c3:#8a3fb5}
@media(prefers-color-scheme:dark){:root{--page:#131517;--card:#1b1e21;--ink:#e8e9eb;--soft:#9aa0a8;--rule:#2e3237;
--c0:#7fb0ff;--c1:#f0a45d;--c2:#68cf97;--c3:#cf9cf0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.5rem;margin:0 0 12px;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:32px 0 10px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tile,figure,article{background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tile{padding:10px 12px;display:flex;flex-direction:column}
.tile span{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.tile b{font-size:1.2rem;font-weight:600;white-space:nowrap;font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:12px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px}
figure{margin:0;padding:10px 12px 6px}
figcaption{display:flex;justify-content:space-between;gap:8px;flex-wrap:wrap;font-size:.9rem}
figcaption b{font-variant-numeric:tabular-nums;font-weight:600}
svg{display:block;width:100%;height:auto;margin-top:4px}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}
.curve{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
circle{fill:currentColor}
.line0{color:var(--c0)}.line1{color:var(--c1)}.line2{color:var(--c2)}.line3{color:var(--c3)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:500}
th:first-child,td:first-child{text-align:left}
figure img{display:block;width:100%;height:auto}
@media(prefers-color-scheme:dark){figure img{filter:invert(.9) hue-rotate(180deg)}}
article{padding:10px 12px;margin:0 0 10px}
.facts{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.85rem;color:var(--soft)}
.facts b{color:var(--ink);font-weight:600;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--soft);font-size:.85rem}
pre{margin:6px 0 0;font:13px/1.45 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
"""
