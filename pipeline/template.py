"""The report's constants: HTML for jinja2, the script that draws the plots, and the style sheet."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ page.title }}</title>
<style>{{ style | safe }}</style>
</head>
{% macro table(grid) %}
<div class="scroll" role="region" aria-label="{{ grid.title }}" tabindex="0">
<table>
<caption>{{ grid.title }}</caption>
<thead><tr>
{% for heading, number in grid.columns %}
<th scope="col"{% if number %} class="n"{% endif %}>{{ heading }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in grid.rows %}
<tr>{% for cell in row %}<td{% if grid.columns[loop.index0][1] %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<body>
<header>
<p class="eyebrow">matryoshka report</p>
<h1>{{ page.title }}</h1>
<p class="about">{{ page.about }}</p>
<p class="verdict">{{ page.verdict }}</p>
<dl class="figures">
{% for name, value, note in page.figures %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd><dd class="note">{{ note }}</dd></div>
{% endfor %}
</dl>
</header>
<nav aria-label="Contents"><ol>
{% for section in page.sections %}
<li><a href="#{{ section.name }}">{{ section.title }}</a></li>
{% endfor %}
</ol></nav>
<noscript><p class="warning">The plots need JavaScript (it is in this file; nothing is loaded).
Their numbers stand in the tables below each.</p></noscript>
<main>
{% for section in page.sections %}
<section id="{{ section.name }}" aria-labelledby="{{ section.name }}-title">
<h2 id="{{ section.name }}-title">{{ section.title }}</h2>
{% for text in section.words %}
<p>{{ text }}</p>
{% endfor %}
{% for text in section.warnings %}
<p class="warning"><strong>Warning.</strong> {{ text }}</p>
{% endfor %}
{% if section.plots %}
<div class="plots">
{% for plot in section.plots %}
<figure>
<h3>{{ plot.title }}</h3>
<div class="plot" id="plot-{{ plot.name }}" role="img" aria-label="{{ plot.says }}"></div>
<script type="application/json" data-plot="plot-{{ plot.name }}">{{ plot.spec | in_script | safe }}</script>
<figcaption>{{ plot.source }}</figcaption>
<details><summary>The numbers</summary>
{{ table(plot | grid) }}
</details>
</figure>
{% endfor %}
</div>
{% endif %}
{% for grid in section.grids %}
{{ table(grid) }}
{% endfor %}
{% for example in section.examples %}
<details class="example"{% if loop.index <= 3 %} open{% endif %}>
<summary><span class="question">{{ example.question }}</span>
{% if example.lost %}<span class="badge">{{ example.lost }} lost</span>{% endif %}</summary>
<div class="scroll" role="region" aria-label="Hits for: {{ example.question }}" tabindex="0">
<table class="hits">
<thead><tr><th scope="col" class="n">rank</th>
{% for level in example.levels %}
<th scope="col">{{ level }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for hits in example.ranks %}
<tr><th scope="row" class="n">{{ loop.index }}</th>
{% for hit in hits %}
{% if hit is none %}<td></td>{% else %}
<td{% if hit.lost %} class="lost"{% endif %}>
<p>{% if hit.lost %}<strong class="badge">lost</strong>{% elif hit.place %}
<span class="place">exact {{ hit.place }}</span>{% endif %}
 <span class="score">{{ "%.3f" | format(hit.score) }}</span></p>
<p><b>{{ hit.name }}</b></p>
<p class="text">{{ hit.text }}</p></td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
{% endfor %}
{% for name, text in section.raw %}
<details class="raw"><summary>{{ name }}</summary><pre tabindex="0">{{ text }}</pre></details>
{% endfor %}
</section>
{% endfor %}
</main>
<script>{{ scripts[0] | safe }}</script>
<script>{{ scripts[1] | safe }}</script>
</body>
</html>
"""

DRAW = """
(() => {
  const font = getComputedStyle(document.body).fontFamily;
  const ink = "var(--ink)", muted = "var(--muted)", rule = "var(--rule)";
  const config = {
    font, background: null, view: {stroke: null},
    axis: {labelColor: muted, titleColor: muted, gridColor: rule, domainColor: muted, tickColor: muted,
           labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 6},
    legend: {orient: "top", direction: "horizontal", labelColor: ink, labelFontSize: 12, symbolSize: 70, offset: 12,
             symbolStrokeWidth: 2, columnPadding: 8, labelLimit: 220,
             layout: {top: {direction: "vertical", anchor: "start", margin: 4}}},
  };
  const options = {mode: "vega-lite", renderer: "svg", actions: false, ast: true, config};
  for (const script of document.querySelectorAll("script[data-plot]")) {
    const place = document.getElementById(script.dataset.plot);
    vegaEmbed(place, JSON.parse(script.textContent), options).then(
      () => { place.dataset.drawn = "yes"; },
      (error) => { place.textContent = "This plot could not be drawn: " + error.message; },
    );
  }
})();
"""

STYLE = """
:root {
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2126; --muted: #5b646e; --rule: #dcdad5; --accent: #0a5cad;
  --warn: #8a3b00; --warn-paper: #fff3e4;
  --s1: #0a5cad; --s2: #c2410c; --s3: #0b7a5c; --s4: #a03c8e; --s5: #5b646e; --s6: #8a6d00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e8e6e1; --muted: #a3abb3; --rule: #343a40; --accent: #7db8ff;
    --warn: #ffb876; --warn-paper: #33240f;
    --s1: #7db8ff; --s2: #ff9a5c; --s3: #4fd1a5; --s4: #ee9bdc; --s5: #b4bcc4; --s6: #e2c04c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: clamp(1.25rem, 4vw, 4rem) clamp(1rem, 4vw, 3rem) 6rem; max-width: 74rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
p, dl, figcaption, h1, h2 { overflow-wrap: anywhere; }
p { max-width: 44rem; margin: 0 0 1rem; }
h1 { font-size: clamp(1.9rem, 5vw, 2.75rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .5rem; }
h2 { font-size: 1.5rem; line-height: 1.25; letter-spacing: -.01em; margin: 0 0 1rem; }
h3 { font-size: 1rem; line-height: 1.4; margin: 0 0 .75rem; }
a { color: var(--accent); text-underline-offset: .2em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.eyebrow { color: var(--muted); font-size: .85rem; margin: 0 0 .75rem; }
.about { color: var(--muted); }
.verdict { font-size: clamp(1.1rem, 2.4vw, 1.3rem); line-height: 1.55; margin: 1.75rem 0 2rem; max-width: 48rem; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: 1.5rem 2rem;
  margin: 0; padding: 1.5rem 0; border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule);
}
.figures dt { color: var(--muted); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures dd.note { font-size: .8rem; line-height: 1.45; color: var(--muted); }
nav ol {
  display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; list-style: none;
  margin: 1.5rem 0 0; padding: 0; font-size: .95rem;
}
section { margin-top: 4.5rem; }
.plots {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 3rem; margin-top: 2rem;
}
figure { margin: 0; min-width: 0; break-inside: avoid; }
.plots > figure:only-child { max-width: 52rem; }
.plot { width: 100%; min-height: 8rem; overflow: hidden; }
.plot svg { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .75rem; font-size: .85rem; line-height: 1.5; color: var(--muted); max-width: 44rem; }
summary { cursor: pointer; }
figure details { margin-top: .5rem; font-size: .9rem; }
.scroll { overflow-x: auto; margin: 1.25rem 0; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.45; }
caption { text-align: left; color: var(--muted); padding-bottom: .5rem; white-space: nowrap; }
th, td {
  text-align: left; vertical-align: baseline; padding: .45rem 1.25rem .45rem 0; border-bottom: 1px solid var(--rule);
}
thead th { font-weight: 600; color: var(--muted); white-space: nowrap; }
td { white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.warning { background: var(--warn-paper); border-left: 4px solid var(--warn); padding: .75rem 1rem; }
.example { border-top: 1px solid var(--rule); padding: .9rem 0; }
.question { font-weight: 600; overflow-wrap: anywhere; }
.badge {
  border: 1.5px solid var(--warn); color: var(--warn); border-radius: 3px; padding: 0 .4em;
  font-size: .78rem; font-weight: 600;
}
.hits td { white-space: normal; min-width: 13rem; max-width: 20rem; vertical-align: top; }
.hits th { vertical-align: top; padding-right: 1rem; }
.hits td.lost { background: var(--warn-paper); box-shadow: inset 4px 0 0 var(--warn); padding-left: .8rem; }
.hits p { margin: 0; overflow-wrap: anywhere; }
.hits .text {
  color: var(--muted); font-size: .8rem; overflow: hidden;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
}
.place { color: var(--muted); border: 1px solid var(--rule); border-radius: 3px; padding: 0 .35em; font-size: .78rem; }
.score { color: var(--muted); font-variant-numeric: tabular-nums; }
.raw { border-top: 1px solid var(--rule); padding: .9rem 0; }
pre {
  overflow: auto; max-height: 40rem; font-size: .8rem; line-height: 1.5; padding: 1rem;
  background: var(--card); border: 1px solid var(--rule);
}
#vg-tooltip-element {
  background: var(--card); color: var(--ink); border: 1px solid var(--rule); border-radius: 4px;
  font-family: inherit; font-size: .8rem; box-shadow: 0 2px 10px rgb(0 0 0 / .2); padding: .5rem .7rem;
}
#vg-tooltip-element table tr td.key { color: var(--muted); }
@media print {
  :root {
    --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --rule: #bbb; --accent: #000;
    --warn: #8a3b00; --warn-paper: #fff;
    --s1: #0a5cad; --s2: #c2410c; --s3: #0b7a5c; --s4: #a03c8e; --s5: #5b646e; --s6: #8a6d00; color-scheme: light;
  }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav, figure details, .raw { display: none; }
  section { margin-top: 2.5rem; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
  .plots { grid-template-columns: 1fr 1fr; gap: 1.5rem; }
  .scroll { overflow: visible; }
  .plots > figure:only-child { grid-column: 1 / -1; }
  table, .hits :is(p, .text, .badge, .place) { font-size: 7.5pt; }
  th, td { padding-right: .6rem; }
  .hits { width: 100%; }
  .hits td { min-width: 0; }
  .example::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
