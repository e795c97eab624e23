"""README's pictures, as SVG for light and dark pages: `python -m lab.pictures` writes them here.

Orange is learned or chosen, grey is frozen.
"""
from pathlib import Path

PAGE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 266" role="img">
<style>
svg {{ --page: #fff; --ink: #24292f; --grey: #6e7781; --frozen: #eaeef2; --own: #bc4c00;
  --light: #fff1e5; font: 15px system-ui, "Segoe UI", Helvetica, "DejaVu Sans", sans-serif; }}
@media (prefers-color-scheme: dark) {{ svg {{ --page: #0d1117; --ink: #e6edf3; --grey: #8b949e;
  --frozen: #2b3138; --own: #f0883e; --light: #3a2412; }} }}
.page {{ fill: var(--page); }}
text {{ fill: var(--ink); text-anchor: middle; }}
.small {{ font-size: 13px; }}
.left {{ text-anchor: start; }}
.bold {{ font-weight: 600; }}
text.own {{ fill: var(--own); }}
text.grey {{ fill: var(--grey); }}
path, ellipse, rect.box {{ fill: none; stroke: var(--ink); stroke-width: 1.5; }}
path.grey, ellipse.grey, rect.grey {{ stroke: var(--grey); }}
path.own, rect.own, ellipse.own {{ stroke: var(--own); stroke-width: 2; }}
.frozen {{ fill: var(--frozen) !important; }}
.light {{ fill: var(--light) !important; }}
.dash {{ stroke-dasharray: 5 4; }}
.faint {{ opacity: 0.5; }}
.halo {{ paint-order: stroke; stroke: var(--page); stroke-width: 5; }}
.to {{ marker-end: url(#ink); }}
.grey.to {{ marker-end: url(#grey); }}
.own.to {{ marker-end: url(#own); }}
</style>
<defs>
<marker id="ink" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9"
  markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" style="fill: var(--ink);
  stroke: none"/></marker>
<marker id="grey" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9"
  markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" style="fill: var(--grey);
  stroke: none"/></marker>
<marker id="own" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="10" markerHeight="10"
  markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" style="fill: var(--own);
  stroke: none"/></marker>
</defs>
<rect class="page" width="780" height="266" rx="8"/>{}</svg>
"""

# x is split into what lies in span(P), which turns, and the rest, which does not; W0 comes after it
IDEA = """
<title>A small rotation before a frozen weight</title>
<rect class="box own dash" x="112" y="22" width="392" height="108" rx="8"/>
<text class="own" x="308" y="45">span(P): r directions, chosen</text>
<text class="bold" x="34" y="149">x</text>
<path d="M46 144H72V92H150" class="to"/>
<path d="M150 62V122L186 106V78z" class="frozen grey"/>
<text x="167" y="97">P</text>
<path d="M186 92H272" class="to"/>
<text x="228" y="83">z = xP</text>
<rect class="box own light" x="274" y="64" width="56" height="56" rx="4"/>
<path class="own to" d="M291 108A16 16 0 1 1 314 108"/>
<text class="own bold" x="302" y="98">T</text>
<text class="small own left" x="338" y="112">r × r, learned</text>
<path d="M330 92H438" class="to"/>
<text x="383" y="83">zTᵀ</text>
<path d="M440 78V106L476 122V62z" class="frozen grey"/>
<text x="460" y="97">Pᵀ</text>
<path d="M476 92H538V131" class="to"/>
<path d="M72 144V196H538V157" class="to"/>
<text class="grey" x="308" y="187">everything else: in − r directions, untouched</text>
<ellipse cx="538" cy="144" rx="12" ry="12"/>
<path d="M531 144H545M538 137V151"/>
<path d="M550 144H592" class="to"/>
<rect class="box grey frozen" x="594" y="92" width="104" height="104" rx="4"/>
<text class="bold" x="646" y="138">W0</text>
<text class="small" x="646" y="157">out × in</text>
<text class="small" x="646" y="174">frozen</text>
<path d="M698 144H736" class="to"/>
<text class="bold" x="750" y="149">y</text>
<text x="390" y="238">W = W0 R,&#160; R = I + P (T − I) Pᵀ,&#160; T = I at the start</text>
"""

# the plane of a rank-one gradient; a path that bends; one span, two bases
QUESTIONS = """
<title>Where to rotate: three questions</title>
<text class="bold" x="130" y="32">1. Which planes?</text>
<ellipse class="own light" cx="130" cy="157" rx="98" ry="44"/>
<path class="grey dash to" d="M130 157V62"/>
<text class="small grey left" x="140" y="74">the rest stays</text>
<path class="to" d="M130 157L219 174"/>
<text x="230" y="182">v</text>
<path class="to" d="M130 157L98 118"/>
<text x="78" y="110">W0ᵀu</text>
<path class="dash" d="M130 157L161 195"/>
<path class="own to" d="M192 169A66 30 0 0 1 160 185"/>
<text class="small" x="130" y="236">v turns towards −W0ᵀu;</text>
<text class="small" x="130" y="254">v alone spans no plane</text>

<clipPath id="panel"><rect x="272" y="52" width="236" height="162"/></clipPath>
<text class="bold" x="390" y="32">2. Whose gradient?</text>
<g class="faint" clip-path="url(#panel)">
<ellipse class="grey" cx="462" cy="177" rx="40" ry="11"/>
<ellipse class="grey" cx="462" cy="177" rx="100" ry="31"/>
<ellipse class="grey" cx="462" cy="177" rx="160" ry="62"/>
<ellipse class="grey" cx="462" cy="177" rx="230" ry="105"/>
</g>
<path class="dash" d="M300 84C311 136 318 171 350 176S420 178 460 177"/>
<path class="to" d="M300 84L316 142"/>
<path class="own to" d="M300 84L434 168"/>
<text class="bold halo" x="294" y="76">W0</text>
<text class="halo" x="294" y="130">S</text>
<text class="own halo left" x="376" y="122">S̄: the sum along it</text>
<text class="small halo left" x="352" y="198">the path of descent</text>
<text class="small" x="390" y="236">S is where descent starts,</text>
<text class="small" x="390" y="254">S̄ where it goes</text>

<text class="bold" x="650" y="32">3. Which basis?</text>
<g transform="translate(0 -8)">
<path class="grey to" d="M545 145H758"/>
<path class="grey to" d="M650 222V62"/>
<text class="grey" x="750" y="166">P</text>
<rect class="box grey dash" x="572" y="87" width="156" height="116"/>
<g transform="rotate(-35 650 145)">
<ellipse class="own light" cx="650" cy="145" rx="92" ry="26"/>
<rect class="box own dash" x="558" y="119" width="184" height="52"/>
<path class="own to" d="M640 145H768"/>
<path class="own to" d="M650 155V95"/>
</g>
<text class="own" x="758" y="66">P V</text>
</g>
<text class="small" x="650" y="236">Adam scales along the axes:</text>
<text class="small" x="650" y="254">turn them to the gradients</text>
"""

if __name__ == "__main__":
    for name, body in (("idea", IDEA), ("questions", QUESTIONS)):
        Path(__file__).with_name(f"{name}.svg").write_text(PAGE.format(body), "utf-8")
