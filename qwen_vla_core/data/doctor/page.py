"""The doctor's report as one self-contained HTML file: no script, no outside file, opens from a mail."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, fields
from pathlib import Path

from qwen_vla_core.data.doctor.case import SIDES
from qwen_vla_core.data.doctor.config import Thresholds
from qwen_vla_core.data.doctor.diagnose import Diagnosis
from qwen_vla_core.data.doctor.plots import plot, sparkline, thumbnails
from qwen_vla_core.errors import UserError
from qwen_vla_core.files import atomic_write_text

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ about.dataset }}: {{ about.errors }} errors, {{ about.warnings }} warnings</title>
<style>
:root { --error: #c23030; --warning: #bf7326; --info: #2f6f9f; --line: #d8dee4; --soft: #f5f7f9; }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; margin: 0 auto; max-width: 72rem; padding: 2rem 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; color: #4b5b6b; margin: .5rem 0 0; padding: 0 }
.facts b { color: #1c2733 }
article { border: 1px solid var(--line); border-left: .4rem solid var(--tone); border-radius: .4rem; margin: 0 0 1rem;
  padding: .8rem 1rem }
.error { --tone: var(--error) } .warning { --tone: var(--warning) } .info { --tone: var(--info) }
.badge { background: var(--tone); color: #fff; border-radius: .25rem; font-size: .75rem; padding: .1rem .45rem;
  text-transform: uppercase; letter-spacing: .04em }
code { background: var(--soft); border-radius: .2rem; padding: .05rem .3rem }
article p { margin: .45rem 0 } .fix::before { content: "Fix: "; font-weight: 600 }
.places { color: #4b5b6b; font-size: .85rem; margin: .3rem 0; overflow-wrap: anywhere }
img { max-width: 100% } .thumbs { display: flex; flex-wrap: wrap; gap: .5rem }
figure { margin: 0; width: 160px; font-size: .72rem; color: #4b5b6b }
figure img { border-radius: .25rem; display: block }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } .ok { color: #29714d; font-weight: 600 }
details { margin-top: 2rem; color: #4b5b6b }
</style></head><body>
<h1>{{ about.dataset }}</h1>
<div class="facts">
{% for name, value in facts %}<span><b>{{ value }}</b> {{ name }}</span>
{% endfor %}</div>
<h2>Findings</h2>
{% for item in findings %}<article class="{{ item.finding.severity }}" id="{{ item.finding.code }}">
<span class="badge">{{ item.finding.severity }}</span> <code>{{ item.finding.code }}</code>
<p>{{ item.finding.message }}</p>
<p class="fix">{{ item.finding.fix }}</p>
{% if item.finding.places %}<p class="places">{% for place in item.finding.places[:8] -%}
{{ place }}{% if place.note %} ({{ place.note }}){% endif %}{% if not loop.last %} · {% endif %}
{%- endfor %}{% if item.finding.total > 8 %} · … {{ item.finding.total }} places in all{% endif %}</p>{% endif %}
{% if item.plot %}<img src="{{ item.plot }}" alt="plot of {{ item.finding.code }}">{% endif %}
{% if item.thumbnails %}<div class="thumbs">{% for caption, source in item.thumbnails %}
<figure><img src="{{ source }}" alt="{{ caption }}">{{ caption }}</figure>{% endfor %}</div>{% endif %}
</article>
{% else %}<p class="ok">Nothing was found: every check passed.</p>
{% endfor %}
<h2>Channels</h2>
<div class="scroll"><table>
<tr><th>channel</th><th>unit</th><th>min</th><th>q01</th><th>median</th><th>q99</th><th>max</th><th>mean</th><th>std</th>
<th>values</th></tr>
{% for side, channel, line in channels %}<tr><td>{{ side }} · {{ channel.name }}</td><td>{{ channel.unit }}</td>
{% for value in (channel.min, channel.q01, channel.q50, channel.q99, channel.max, channel.mean, channel.std) -%}
<td>{{ "%.4g"|format(value) }}</td>{% endfor %}<td>{{ line|safe }}</td></tr>
{% endfor %}</table></div>
<details><summary>Thresholds of this report</summary><table>
{% for name, value, meaning in thresholds %}<tr><td><code>{{ name }}</code></td><td>{{ value }}</td>
<td style="text-align:left;white-space:normal">{{ meaning }}</td></tr>{% endfor %}</table></details>
</body></html>
"""


def render(diagnosis: Diagnosis) -> str:
    """The HTML text."""
    from jinja2 import Environment

    about = diagnosis.summary()
    facts = [
        ("errors", about["errors"]),
        ("warnings", about["warnings"]),
        ("episodes", about["episodes"]),
        ("steps", f"{about['steps']:,}"),
        ("hours", f"{about['hours']:.2f}"),
        ("Hz", f"{about['fps']:g}"),
        ("pictures looked at", f"{about['pictures_looked_at']:,}"),
        ("embodiment", about["embodiment"] or "none given: judged by units alone"),
    ]
    case = diagnosis.case
    findings = [{"finding": f, "plot": plot(case, f), "thumbnails": thumbnails(case, f)} for f in diagnosis.findings]
    channels = [
        (side, summary, sparkline(sketch))
        for side in SIDES
        for summary, (_, sketch) in zip(diagnosis.statistics[side], case.channels(side), strict=True)
    ]
    chosen = asdict(case.thresholds)
    thresholds = [(each.name, chosen[each.name], each.metadata["doc"]) for each in fields(Thresholds)]
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(about=about, facts=facts, findings=findings, channels=channels, thresholds=thresholds)


def check_page(path: Path) -> None:
    """Says before the work what would go wrong after it.

    Raises:
        UserError: the path is a folder, or the packages of the page are not installed.
    """
    if path.is_dir():
        raise UserError(f"--html {path}: is a folder; name a file in it")
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--html: needs {' and '.join(missing)}; pip install 'qwen_vla_ros[data]', or leave --html out")


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the HTML file, whole or not at all.

    Raises:
        UserError: the disk refuses.
    """
    try:
        atomic_write_text(path, render(diagnosis))
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror or error}); name another file") from None
