"""A page of a class graph: its kernels from the class to the image, and where each one looks."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .base import normalize
from .flow import Kernel
from .html import filled, uri
from .render import SIDE, enlarged, to_frames

if TYPE_CHECKING:
    from .class_graph import ClassGraph

CELLS = {2: (32, 32), 3: (8, 16, 16)}  # at most, of the tube of a kernel of images and of clips
PAGE = '''<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Class graph</title>
<style>
  body { font: 14px/1.45 system-ui, sans-serif; margin: 0; padding: 1rem; color: #222; display: flex; gap: 1rem }
  #graph { flex: 1; width: 100%; min-width: 0; position: relative; align-self: flex-start }
  #edges { position: absolute; pointer-events: none } #nodes { position: relative; display: block; width: 100% }
  aside { width: 21rem; position: sticky; top: 1rem; align-self: flex-start; overflow: auto }
  aside { max-height: calc(100vh - 2rem) } h1 { font-size: 1.15rem; margin: 0 }
  p { margin: .35rem 0; overflow-wrap: anywhere }
  #view { display: block; width: 100%; max-height: 50vh; object-fit: contain; background: #000 }
  @media (max-width: 800px) { body { flex-direction: column-reverse } aside { position: static; width: 100% } }
/*STYLE*/  aside .row label { width: 6.5rem }
  text { font-size: 11px; paint-order: stroke; stroke: #fff; stroke-width: 3px; fill: #444 }
  .kernel { cursor: pointer; outline: none } .kernel text { font-size: 10px; pointer-events: none }
  .kernel circle { fill: #555; stroke: transparent; stroke-width: 8px }
  .far { opacity: .25 } .above circle { fill: #c2540a } .below circle { fill: #1b6fc2 }
  .active circle { fill: #111; stroke: #f5b800; stroke-width: 3px }
  b.above { color: #c2540a } b.below { color: #1b6fc2 }
</style>
<div id="graph"><canvas id="edges"></canvas><svg id="nodes" role="group" aria-label="Kernels by layer"></svg></div>
<aside>
  <h1 id="title"></h1><p id="about"></p>
  <canvas id="view"></canvas>
  <div class="row" id="timeline"><label for="time">Frame</label><input id="time" type="range" min="0" value="0">
    <output id="number"></output></div>
  <div class="row"><label for="alpha">Opacity</label><input id="alpha" type="range" min="0" max="100" value="50">
    <output id="percent"></output></div>
  <div class="row"><label for="least">Least strength</label><input id="least" type="range" min="0" max="100" value="0">
    <output id="bound"></output></div>
  <div id="kernel" aria-live="polite"></div>
</aside>
<script type="application/json" id="data">/*DATA*/</script>
<script>
'use strict';
/*SCRIPT*/const {layers, nodes, edges} = data, frames = data.frames.map(image);
const view = get('view'), pen = view.getContext('2d'), lines = get('edges').getContext('2d');
const heat = new OffscreenCanvas(data.width, data.height), heatPen = heat.getContext('2d', {willReadFrequently: true});
const make = (name, parent) => parent.appendChild(document.createElementNS('http://www.w3.org/2000/svg', name));
const set = (element, values) => Object.entries(values).forEach(([name, value]) => element.setAttribute(name, value));
const title = node => `${layers[node.row]}/${node.kernel}`;
const rows = layers.map(() => []);
let pinned = null, hovered = null, least = 0;
edges.sort((one, other) => one[2] - other[2]);
const strongest = edges.length ? edges[edges.length - 1][2] : 1;
const labels = layers.map((layer, row) => {
  const text = make('text', get('nodes'));
  text.textContent = layer.length > 30 ? '…' + layer.slice(-29) : layer;
  make('title', text).textContent = layer;
  return text;
});
nodes.forEach((node, index) => {
  Object.assign(node, {index, above: [], below: [], element: make('g', get('nodes'))});
  rows[node.row].push(node);
  const {element} = node;
  set(element, {role: 'button', tabindex: index ? -1 : 0, id: title(node),
                'aria-label': `${title(node)}, strength ${node.strength}`});
  make('circle', element);
  make('text', element).textContent = node.kernel;
  element.onfocus = () => pin(node);
  element.onclick = () => element.focus();
  element.onpointerenter = () => { hovered = node; update(); };
  element.onpointerleave = () => { hovered = null; update(); };
});
for (const edge of [...edges].reverse()) {  // the strongest first
  nodes[edge[0]].below.push(edge);
  nodes[edge[1]].above.push(edge);
}
rows.forEach(row => row.sort((one, other) => other.strength - one.strength));

function layout() {
  const width = get('graph').clientWidth, step = Math.max(18, Math.min(48, (innerHeight - 32) / layers.length));
  const left = 12 + Math.max(...labels.map(text => text.getComputedTextLength())), scale = devicePixelRatio;
  get('nodes').setAttribute('height', step * layers.length);
  Object.assign(get('edges'), {width: width * scale, height: step * layers.length * scale});
  Object.assign(get('edges').style, {width: `${width}px`, height: `${step * layers.length}px`});
  lines.setTransform(scale, 0, 0, scale, 0, 0);
  rows.forEach((row, number) => {
    const y = (number + .5) * step;
    labels[number].setAttribute('y', y + 4);
    row.forEach(node => { node.r = Math.max(2, .42 * step * Math.sqrt(node.strength)); });
    const gap = Math.max(0, (width - left - 2 * row.reduce((sum, node) => sum + node.r, 0)) / row.length);
    let x = left;
    for (const node of row) {
      Object.assign(node, {x: x + gap / 2 + node.r, y});
      x += gap + 2 * node.r;
      const [circle, text] = node.element.children;
      set(circle, {cx: node.x, cy: y, r: node.r});
      set(text, {x: node.x + node.r + 3, y: y + 3.5});
      text.style.display = gap < 34 ? 'none' : '';
    }
  });
  update();
}

const shown = node => node.strength >= least;
function update() {
  const active = [hovered, pinned].find(node => node && shown(node)), near = new Map();
  const kept = edges.filter(([from, to, strength]) => strength >= least && shown(nodes[from]) && shown(nodes[to]));
  const own = kept.filter(edge => active && edge.slice(0, 2).includes(active.index));
  for (const [from, to] of own) near.set(from, 'above').set(to, 'below');
  if (active) near.set(active.index, 'active');
  lines.clearRect(0, 0, get('edges').width, get('edges').height);
  for (const [edge, mine] of [...kept.map(edge => [edge, false]), ...own.map(edge => [edge, true])]) {
    const [from, to] = [nodes[edge[0]], nodes[edge[1]]], part = edge[2] / strongest, half = (from.y + to.y) / 2;
    lines.strokeStyle = !mine ? '#555' : from === active ? '#1b6fc2' : '#c2540a';
    lines.globalAlpha = active && !mine ? .06 : mine ? .9 : .12 + .6 * part;
    lines.lineWidth = .5 + 4 * part;
    lines.beginPath();
    lines.moveTo(from.x, from.y);
    lines.bezierCurveTo(from.x, half, to.x, half, to.x, to.y);
    lines.stroke();
  }
  for (const node of nodes) {
    const state = active ? near.get(node.index) || 'far' : '';
    node.element.setAttribute('class', `kernel ${state}`);
    node.element.style.display = shown(node) ? '' : 'none';
  }
  get('bound').textContent = least.toPrecision(2);
  describe(active);
  draw(active);
}

function describe(node) {
  const say = (kind, heading, text) => {
    const line = get('kernel').appendChild(document.createElement('p')), bold = document.createElement('b');
    bold.className = kind;
    bold.textContent = heading;
    line.append(bold, text);
  };
  const list = (edges, end) => (edges.slice(0, 6).map(edge => ` ${title(nodes[edge[end]])} (${edge[2]})`).join(',')
    || ' no other kernel') + (edges.length > 6 ? `, and ${edges.length - 6} more` : '');
  get('kernel').replaceChildren();
  if (!node) return say('', '', 'Point at a kernel, click it, or walk with Tab and the arrow keys.');
  say('', title(node), `: strength ${node.strength}${node.tube === null ? '; it has no map' : ''}`);
  say('above', 'Gives to', list(node.above, 0));
  say('below', 'Depends on', list(node.below, 1));
}

let latest = 0;
async function draw(node) {
  const number = ++latest, time = +get('time').value, length = +get('time').max + 1, alpha = get('alpha').value / 100;
  const tube = node && node.tube !== null ? (node.images ??= data.tubes[node.tube].map(image)) : [];
  await Promise.all([...frames, ...tube].map(item => item.decode()));
  if (number !== latest) return;  // another one was chosen meanwhile
  get('number').textContent = `${time + 1} / ${length}`;
  get('percent').textContent = `${get('alpha').value} %`;
  pen.globalAlpha = 1;
  pen.clearRect(0, 0, data.width, data.height);
  if (frames.length) pen.drawImage(frames[Math.min(time, frames.length - 1)], 0, 0);
  if (!tube.length) return;
  const place = Math.min(tube.length - 1, Math.max(0, (time + .5) * tube.length / length - .5));
  const early = Math.floor(place);
  for (const [item, weight] of [[tube[early], 1], [tube[Math.ceil(place)], place - early]]) {
    heatPen.globalAlpha = weight;
    heatPen.drawImage(item, 0, 0, data.width, data.height);
  }
  colour(heatPen, false);
  pen.globalAlpha = frames.length ? alpha : 1;
  pen.drawImage(heat, 0, 0);
}

function pin(node) {
  if (pinned) pinned.element.setAttribute('tabindex', -1);
  pinned = node;
  (node || nodes[0]).element.setAttribute('tabindex', 0);
  update();
}
get('nodes').onkeydown = event => {
  if (event.key === 'Escape') { document.activeElement.blur(); pin(null); return; }
  const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (!step || !pinned) return;
  event.preventDefault();
  const [across, along] = step;
  const own = rows[pinned.row].filter(shown), far = node => Math.abs(node.x - pinned.x);
  let row = pinned.row + along;
  while (rows[row] && !rows[row].some(shown)) row += along;
  const next = across ? own[own.indexOf(pinned) + across] :
    (rows[row] || []).filter(shown).sort((one, other) => far(one) - far(other))[0];
  if (next) next.element.focus();
};
get('least').oninput = () => { least = strongest * (get('least').value / 100) ** 2; update(); };
for (const id of ['time', 'alpha']) get(id).oninput = update;
onresize = layout;
Object.assign(view, {width: data.width, height: data.height});
get('time').max = data.length - 1;
if (data.length === 1) get('timeline').style.display = 'none';
get('title').textContent = document.title = data.title;
get('about').textContent = data.about;
// No more edges at first than can be told apart.
get('least').value = Math.ceil(100 * Math.sqrt((edges.at(-1500) || [0, 0, 0])[2] / strongest));
get('least').oninput();
layout();
</script>
</html>
'''


def page(graph: ClassGraph, inputs: Tensor | None = None, *, mean: Sequence[float] | None = None,
         std: Sequence[float] | None = None, names: Sequence[str] | None = None) -> str:
    """The page of a graph; see `ClassGraph.save`."""
    if inputs is not None and (inputs.ndim not in (4, 5) or len(inputs) != 1):
        raise ValueError(f'inputs must be one image (1, C, H, W) or clip (1, C, T, H, W), got {tuple(inputs.shape)}')
    frames = [] if inputs is None else list(to_frames(enlarged(inputs), mean, std)[0])
    tubes: dict[tuple[str, ...], int] = {}
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    rows = {layer: row for row, layer in enumerate(graph.layers)}
    nodes = []
    for node, strength in graph.nodes.items():
        tube = _tube(graph, node)
        nodes.append({'row': rows[node[0]], 'kernel': node[1], 'strength': float(f'{strength:.3g}'),
                      'tube': tubes.setdefault(tube, len(tubes)) if tube else None})
    edges = [(numbers[parent], numbers[child], float(f'{strength:.3g}'))
             for (parent, child), strength in graph.edges.items()]
    name = f'class {graph.target}'
    data = {'title': f'{names[graph.target]} ({name})' if names else name, 'layers': graph.layers, 'nodes': nodes,
            'about': f'{len(nodes)} kernels of {len(rows)} layers, from the class at the top to the input; '
                     f'contributions by rule {graph.rule}, {graph.select[0]} {graph.select[1]}',
            'edges': edges, 'tubes': list(tubes), 'frames': [uri(frame, 'JPEG') for frame in frames],
            'length': max(map(len, (frames, *tubes, ' '))),
            'height': frames[0].shape[0] if frames else SIDE, 'width': frames[0].shape[1] if frames else SIDE}
    return filled(PAGE, data)


def _tube(graph: ClassGraph, node: Kernel) -> tuple[str, ...]:
    """The kernel's tube as small grey images, one for each frame; none where it has no maps."""
    try:
        tube = graph.tube(node)
    except ValueError:
        return ()
    cells = [min(size, most) for size, most in zip(tube.shape[2:], CELLS[tube.ndim - 2])]
    small = normalize(F.interpolate(tube.relu(), cells, mode='area')) * 255
    return tuple(uri(frame.numpy(), 'PNG') for frame in small.round().byte().cpu().reshape(-1, *cells[-2:]))
