"""Draw docs/images/overview.svg, the picture of the README: who talks to whom.

python docs/picture.py
"""
# ruff: noqa: INP001  a script of its own, and a drawing is made of numbers

from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).resolve().parent / "images" / "overview.svg"
_STYLE = """
  text { font: 15px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2933; }
  .title { font-weight: 600; }
  .small { font-size: 12.5px; fill: #52606d; }
  .code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; fill: #52606d; }
  .step { font-size: 12.5px; fill: #0b69a3; }
  rect { fill: #ffffff; stroke: #9aa5b1; stroke-width: 1.5; }
  .page { fill: #f8fafc; stroke: none; }
  .ours { fill: #e6f6ff; stroke: #0b69a3; }
  .store { fill: #fff7ed; stroke: #c2410c; }
  path { fill: none; stroke: #52606d; stroke-width: 1.5; }
  .main { stroke: #0b69a3; stroke-width: 2; }
"""


def box(x: int, y: int, width: int, height: int, kind: str = "") -> str:
    """Return a rounded box."""
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'


def text(x: int, y: int, words: str, kind: str = "", anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def arrow(path: str, kind: str = "", both: str = "") -> str:
    """Return an arrow along a path; both: ends on each side."""
    start = ' marker-start="url(#head)"' if both else ""
    return f'<path class="{kind}" d="{path}" marker-end="url(#head)"{start}/>'


def drawing() -> list[str]:
    """Return the elements, from left to right."""
    return [
        box(0, 0, 880, 350, "page"),
        # apps
        box(24, 96, 150, 84),
        text(99, 128, "Apps", "title"),
        text(99, 148, "OpenAI SDKs", "small"),
        text(99, 166, "install id, licence", "small"),
        arrow("M174 138 H 270", "main", "both"),
        text(222, 128, "HTTP", "step"),
        # relays, three deep
        box(290, 64, 226, 148, "ours"),
        box(282, 72, 226, 148, "ours"),
        box(274, 80, 226, 148, "ours"),
        text(387, 108, "Relays", "title"),
        text(292, 136, "1  identify install and tier", "small", "start"),
        text(292, 158, "2  reserve credits", "small", "start"),
        text(292, 180, "3  forward the request", "small", "start"),
        text(292, 202, "4  commit or release", "small", "start"),
        # backends
        box(650, 40, 206, 62),
        text(753, 66, "Gemini", "title"),
        text(753, 86, "metered, with a cap", "small"),
        box(650, 152, 206, 62),
        text(753, 178, "Your hardware", "title"),
        text(753, 198, "vLLM, llama.cpp, Ollama", "small"),
        arrow("M516 110 C 580 110, 580 71, 646 71", "main"),
        arrow("M516 168 C 580 168, 580 183, 646 183", "main"),
        arrow("M800 102 V 148"),
        text(790, 131, "cap used up, or failed", "step", "end"),
        # redis
        box(274, 272, 242, 62, "store"),
        text(395, 298, "Redis or Valkey", "title"),
        text(395, 318, "credits:install:<id>", "code"),
        arrow("M387 228 V 268", "main", "both"),
        text(399, 254, "one Lua script, one atomic step", "step", "start"),
        # ledger
        box(650, 272, 206, 62),
        text(753, 298, "credits.json", "title"),
        text(753, 318, "dump, import, restore", "small"),
        arrow("M516 303 H 646", "", "both"),
        text(583, 293, "persister", "step"),
    ]


def svg() -> str:
    """Return the picture."""
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 350" width="880" height="350" role="img" '
        'aria-label="Apps send requests to relays, which reserve credits in Redis, forward to Gemini or to your own '
        'hardware, and commit or release.">'
    )
    marker = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="10" markerHeight="10" '
        'markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
        '<path d="M0 0 L10 5 L0 10 z" style="fill:#52606d;stroke:none"/></marker>'
    )
    return "\n".join([head, f"<style>{_STYLE}</style>", f"<defs>{marker}</defs>", *drawing(), "</svg>", ""])


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(svg(), encoding="utf-8")
