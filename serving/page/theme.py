"""The look of the page: a few lines of CSS over Gradio's own, and a theme that asks no other server for fonts."""

from typing import Any

__all__ = ["CSS", "theme"]

CSS = """
.gradio-container {max-width: 1360px !important; margin: 0 auto !important; padding: 16px !important}
.gradio-container .fillable {padding: 0 !important}
.gradio-container .html-container {padding: 0}
#title h1 {font-size: 1.5rem; font-weight: 700; margin: 0; letter-spacing: -.02em}
#title p {margin: 2px 0 0; opacity: .7}
#room {display: grid; gap: 20px; grid-template-columns: minmax(300px, 4fr) minmax(0, 8fr); align-items: start;
  grid-template-areas: "ask made" "more made"; grid-template-rows: auto 1fr}
#ask {grid-area: ask} #made {grid-area: made} #more {grid-area: more}
#ask, #made, #more {min-width: 0 !important; gap: 12px}
#buttons button {min-width: 0}
#speed .tab-like-container, #speed .min_value, #speed .max_value {display: none}
#plan-row, #seed-row {align-items: stretch; gap: 8px}
#upload {align-self: stretch; min-width: 0; white-space: normal; line-height: 1.2}
#dice {font-size: 1.6rem; line-height: 1; min-width: 0; flex: 0 0 56px; padding: 0}

#pictures {display: grid; gap: 12px; grid-template-columns: repeat(3, minmax(0, 1fr)); align-items: start}
#pictures > * {min-width: 0 !important}
#pictures:not(:has(#full)) {grid-template-columns: minmax(0, 480px)}
#pictures .image-frame, #pictures .image-container, #pictures button {width: 100%; height: 100%}
#pictures img {width: 100% !important; height: 100% !important; object-fit: contain; aspect-ratio: 1}
#picture:not(:has(img)) {aspect-ratio: 1}

.status {font-variant-numeric: tabular-nums; line-height: 1.4; min-height: 2.6em; overflow-wrap: anywhere}
.status.wrong, .cost.wrong {color: #b3261e; background: #b3261e14; border-left: 3px solid #b3261e; padding: 6px 10px}
.dark .status.wrong, .dark .cost.wrong {color: #ff8a80}
.bar {height: 6px; border-radius: 3px; background: #2f669026; margin-top: 6px; overflow: hidden}
.bar i {display: block; height: 100%; background: #2f6690}
.cost {margin: 0; font-size: .9rem; overflow-wrap: anywhere}

.dark {--not-needed: #334155; --not-in-this-UNet: #0b0f19}
.strip {display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 4px 8px}
.strip .blocks {display: flex; flex-direction: column; font-size: 11px; opacity: .75; text-align: right;
  height: clamp(180px, 26vw, 300px)}
.strip .blocks span {display: flex; align-items: center; justify-content: flex-end; min-height: 0;
  overflow: visible; line-height: 0}
.strip svg {width: 100%; height: 0; min-height: 100%; display: block}
.strip use {opacity: .22}
.strip use.now {opacity: .6}
.strip use.done {opacity: 1}
.axis {display: flex; justify-content: space-between; font-size: 11px; opacity: .75}
.legend {display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12px; margin-top: 6px}
.legend span {display: inline-flex; align-items: center; gap: 6px}
.legend i {width: 12px; height: 12px; border-radius: 2px; border: 1px solid #9996}

.figures {display: flex; flex-wrap: wrap; gap: 10px}
.figures div {flex: 1 1 96px; padding: 10px 12px; border-radius: 8px; background: #2f669014;
  display: flex; flex-direction: column}
.figures.compared div:first-child {background: #2f6690}
.figures.compared div:first-child > * {color: #fff; opacity: 1}
.dark .figures div {background: #7fb3d52b}
.figures b {font-size: 1.35rem; line-height: 1.2; font-variant-numeric: tabular-nums}
.figures span {font-size: .8rem; opacity: .75; overflow-wrap: anywhere}

@media (max-width: 800px) {
  .gradio-container {padding: 10px !important}
  #title p {font-size: .85rem}
  #room {grid-template-columns: minmax(0, 1fr); grid-template-areas: "ask" "made" "more"; grid-template-rows: none}
  #pictures {grid-template-columns: repeat(2, minmax(0, 1fr))}
  #pictures #picture {grid-column: 1 / -1}
  #full .icon-button-wrapper, #difference .icon-button-wrapper {display: none}
  .strip .blocks {height: 190px}
}
"""


_BLUE, _DEEPER = "#2f6690", "#24506f"
"""Of computed units, and of a button that is touched."""


def theme() -> Any:
    """Gradio's plain theme in the strip's colours, with the fonts that a visitor's system has."""
    from gradio.themes import Base, colors

    return Base(
        primary_hue=colors.blue,
        neutral_hue=colors.slate,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        button_primary_background_fill=_BLUE,
        button_primary_background_fill_dark=_BLUE,
        button_primary_background_fill_hover=_DEEPER,
        button_primary_background_fill_hover_dark=_DEEPER,
        button_primary_text_color="#ffffff",
    )
