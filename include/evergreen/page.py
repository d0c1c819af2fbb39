"""How Evergreen's pages begin: one look, light and dark, wide and narrow, that asks nothing of the network."""

from __future__ import annotations

from html import escape


def head(title: str, style: str = "") -> str:
    """A page up to the inside of `<main>`; `style` is what this page has beside the common look.

    It holds no script, and its policy forbids every request. A header or article takes its colour, `--tone`, from the
    class fault, shift, season, calm or quiet.
    """
    return f"{_HEAD.replace('{title}', escape(title))}{style}</style></head><body><main>\n"


_HEAD = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name=color-scheme content="light dark"><link rel=icon href="data:,"><title>{title}</title><style>
:root{--paper:#fff;--card:#f8fafc;--edge:#e2e8f0;--ink:#0f172a;--soft:#526075;--was:#b6c2d1;--is:#0f766e;--bad:#c2410c;
--fault:#b91c1c;--shift:#c2410c;--season:#6d28d9;--calm:#0f766e;--quiet:#64748b}
@media (prefers-color-scheme:dark){:root{--paper:#0b1220;--card:#131c2e;--edge:#263349;--ink:#e7ecf3;--soft:#9aa8bb;
--was:#47566d;--is:#2dd4bf;--bad:#fb923c;--fault:#f87171;--shift:#fb923c;--season:#a78bfa;--calm:#2dd4bf;--quiet:#94a3b8}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:auto;padding:24px 20px 40px}
header{border-left:6px solid var(--tone);padding:2px 0 2px 18px;margin-bottom:28px}
header p{margin:0;color:var(--soft)}.pack{font-weight:600}.pack span,h3 span{font-weight:400;color:var(--soft)}
h1{margin:0;font-size:34px;line-height:1.25;color:var(--tone)}h1::first-letter{text-transform:uppercase}
h1 small{font-size:16px;font-weight:500;color:var(--ink);margin-left:8px}
h2{font-size:13px;letter-spacing:.08em;text-transform:uppercase;color:var(--soft);margin:32px 0 10px}
h3{font-size:15px;margin:0 0 6px;overflow-wrap:anywhere}section>h3{margin:20px 0 4px;font-weight:500}
.fault{--tone:var(--fault)}.shift{--tone:var(--shift)}.season{--tone:var(--season)}.calm{--tone:var(--calm)}
.quiet{--tone:var(--quiet)}
.why{margin:0;padding-left:20px;overflow-wrap:anywhere}.why li{margin:3px 0}.why li:first-child{font-weight:600}
.note{color:var(--soft);font-size:13px;margin:4px 0}
dl{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;font-size:13px}dl div{display:flex;gap:6px}
dt{color:var(--soft)}dd{margin:0;font-variant-numeric:tabular-nums}
footer{margin-top:32px;padding-top:12px;border-top:1px solid var(--edge);color:var(--soft);font-size:13px}
footer p{margin:4px 0;overflow-wrap:anywhere}
@media (max-width:480px){main{padding:16px 14px 32px}h1{font-size:28px}h1 small{display:block;margin:0}}
"""
