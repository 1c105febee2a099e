"""A page that plays clips under their tubes, and what pages share: one file, which needs no server and no network."""
from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

STYLE = '''  .row { display: flex; gap: .75rem; align-items: center; margin: .5rem 0; max-width: 32rem }
  .row label { width: 5rem } .row input, .row select { flex: 1; min-width: 0 } output { width: 4rem; text-align: right }
'''
SCRIPT = '''const data = JSON.parse(document.getElementById('data').textContent);
const get = id => document.getElementById(id);
const image = source => { const item = new Image(); item.src = source; return item; };
const jet = (value, centre) => 255 * Math.min(1, Math.max(0, 1.5 - Math.abs(4 * value - centre)));
function colour(pen, focus) {  // grey pixels become their colours, or the shadow over what they leave out
  const pixels = pen.getImageData(0, 0, pen.canvas.width, pen.canvas.height), bytes = pixels.data;
  for (let i = 0; i < bytes.length; i += 4) {
    const value = bytes[i] / 255;
    if (focus) { bytes[i] = bytes[i + 1] = bytes[i + 2] = 0; bytes[i + 3] = 235 * (1 - value); }
    else { bytes[i] = jet(value, 3); bytes[i + 1] = jet(value, 2); bytes[i + 2] = jet(value, 1); }
  }
  pen.putImageData(pixels, 0, 0);
}
'''
PAGE = '''<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explanation</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 44rem; padding: 0 1rem; color: #222 }
  canvas { display: block; width: 100%; max-width: 32rem; image-rendering: auto; background: #000 }
/*STYLE*/</style>
<canvas id="view"></canvas>
<div class="row" id="timeline"><label for="time">Frame</label><input id="time" type="range" min="0" value="0">
  <output id="number"></output><button id="play">Play</button></div>
<div class="row"><label for="alpha">Opacity</label><input id="alpha" type="range" min="0" max="100">
  <output id="percent"></output></div>
<div class="row"><label for="panel">Map</label><select id="panel"></select></div>
<div class="row"><label for="style">Style</label><select id="style"><option value="overlay">overlay</option>
  <option value="focus">focus</option></select></div>
<script type="application/json" id="data">/*DATA*/</script>
<script>
'use strict';
/*SCRIPT*/const view = get('view'), pen = view.getContext('2d');
const heat = new OffscreenCanvas(data.width, data.height), heatPen = heat.getContext('2d', {willReadFrequently: true});
const clips = data.clips.map(frames => frames.map(image));
const panels = data.panels.map(panel => ({...panel, maps: panel.maps.map(image)}));
view.width = data.width; view.height = data.height;
panels.forEach((panel, index) => get('panel').add(new Option(panel.label, index)));
get('time').max = clips[0].length - 1;
get('timeline').hidden = clips[0].length === 1;
if (get('timeline').hidden) get('timeline').style.display = 'none';
get('alpha').value = Math.round(100 * data.alpha);

function draw() {
  const panel = panels[get('panel').value], time = +get('time').value, alpha = get('alpha').value / 100;
  const focus = get('style').value === 'focus';
  get('number').textContent = `${time + 1} / ${clips[0].length}`;
  get('percent').textContent = `${get('alpha').value} %`;
  heatPen.drawImage(panel.maps[time], 0, 0);
  colour(heatPen, focus);
  pen.globalAlpha = 1;
  pen.drawImage(clips[panel.clip][time], 0, 0);
  pen.globalAlpha = focus ? 1 : alpha;
  pen.drawImage(heat, 0, 0);
}

let timer = null;
function play() {
  if (timer) { clearInterval(timer); timer = null; }
  else timer = setInterval(() => {
    get('time').value = (+get('time').value + 1) % clips[0].length;
    draw();
  }, 1000 / data.fps);
  get('play').textContent = timer ? 'Pause' : 'Play';
}
get('play').onclick = play;
for (const id of ['time', 'alpha', 'panel', 'style']) get(id).oninput = draw;
Promise.all([...clips, ...panels.map(panel => panel.maps)].flat().map(item => item.decode())).then(draw);
</script>
</html>
'''


def page(tubes: Sequence[tuple[str, int, str, np.ndarray, dict[str, np.ndarray]]], *, fps: float = 8,
         alpha: float = 0.5) -> str:
    """The page of what `explain.render` makes of explanations: (label, the clip's number, its caption, frames, layer ->
    tube)."""
    clips = {number: [uri(frame, 'JPEG') for frame in frames] for _, number, _, frames, _ in tubes}
    shown = [{'label': ' '.join(part for part in (label, layer, caption if len(clips) > 1 else '') if part) or 'map',
              'clip': number, 'maps': [uri((map_ * 255).round().astype(np.uint8), 'PNG') for map_ in tube]}
             for label, number, caption, _, layers in tubes for layer, tube in layers.items()]
    height, width = tubes[0][3].shape[1:3]
    data = {'width': width, 'height': height, 'fps': fps, 'alpha': alpha, 'panels': shown,
            'clips': [clips[number] for number in sorted(clips)]}
    return filled(PAGE, data)


def filled(template: str, data: Any) -> str:
    """A page with the shared style and script, and with ``data`` for it."""
    page = template.replace('/*STYLE*/', STYLE).replace('/*SCRIPT*/', SCRIPT)
    return page.replace('/*DATA*/', json.dumps(data).replace('<', '\\u003c'))  # which would end the script


def uri(pixels: np.ndarray, kind: str) -> str:
    """An image, uint8 (H, W) or (H, W, 3), as the address of itself."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'
