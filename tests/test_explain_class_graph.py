"""The graph of a class by itself, made by hand: what it is as text, as a page, and where its kernels look."""
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import networkx
import numpy as np
import pytest
import torch

from explain import ClassGraph

ROOT, STRONG, WEAK, FIRST = ('head', 2), ('last', 4), ('last', 1), ('stem', 0)


def graph(clip=False, rule='grad'):
    """Class 2 of two kernels that both read channels 0 and 1 of the stem, the strong one channel 0 above all."""
    left, right = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    left[0, 0, 0], right[1, 3, 3] = 4, 2
    maps = {('head', 4): None, ('head', 1): None, ('last', 0): left, ('last', 1): right}
    return ClassGraph(
        2, rule, ('topk', 2), nodes={ROOT: 1.0, STRONG: 0.75, WEAK: 0.25, FIRST: 1.0},
        edges={(ROOT, STRONG): 0.75, (ROOT, WEAK): 0.25, (STRONG, FIRST): 0.75, (WEAK, FIRST): 0.25},
        channels={ROOT: {4: 0.75, 1: 0.25}, STRONG: {0: 0.75, 1: 0.25}, WEAK: {1: 1.0}},
        maps={name: map_ if clip or map_ is None else map_.sum(0) for name, map_ in maps.items()})


def test_a_list_of_streams_is_not_shown(tmp_path):
    with pytest.raises(TypeError, match='inputs must be one tensor, of several that which is to be seen, got list'):
        graph().save(tmp_path / 'graph.html', [torch.zeros(1, 3, 8, 8)])


def test_layers_go_from_the_class_to_the_image():
    assert graph().layers == ['head', 'last', 'stem']


@pytest.mark.parametrize('rule, peaks', [('grad', (4, 2)), ('paper', (4, 2)), ('folded', (3, 0.5))])
def test_a_tube_is_the_sum_of_the_channels_times_their_shares_if_folded(rule, peaks):
    tube = graph(rule=rule).tube(STRONG)
    assert tube.shape == (1, 1, 4, 4) and (tube[0, 0, 0, 0], tube[0, 0, 3, 3]) == peaks
    assert tube.sum() == sum(peaks)


def test_a_kernel_s_tube_has_its_own_channels_only_and_that_of_a_clip_has_time():
    tube = graph(clip=True).tube(WEAK)
    assert tube.shape == (1, 1, 2, 4, 4) and tube[0, 0, 1, 3, 3] == tube.sum() == 2


@pytest.mark.parametrize('node, message', [
    (('last', 9), r"node must be a kernel \(layer, index\) of the graph, got \('last', 9\)"),
    (ROOT, r"node must read maps, got \('head', 2\), which reads vectors"),
    (FIRST, r"node must read maps, got \('stem', 0\), which reads nothing that was selected")])
def test_a_kernel_that_has_no_tube_says_why(node, message):
    with pytest.raises(ValueError, match=message):
        graph().tube(node)


def test_networkx_has_the_strengths_of_nodes_and_edges():
    found = graph().to_networkx()
    assert networkx.is_directed_acyclic_graph(found) and found.graph['target'] == 2
    assert dict(found.nodes[STRONG]) == {'layer': 'last', 'kernel': 4, 'strength': 0.75}
    assert networkx.get_edge_attributes(found, 'strength') == graph().edges
    assert next(iter(networkx.topological_sort(found))) == ROOT


def test_dot_has_a_row_for_each_layer_and_thick_edges_for_strong_ones():
    text = graph().to_dot()
    assert re.fullmatch(r'digraph \{\n(  (node|\{ rank=same;|"[^"]+" -> "[^"]+") ?.*[;}]\n)+\}\n', text)
    assert re.findall(r'rank=same;((?: "[^"]+";)+) \}', text) == [' "head/2";', ' "last/4"; "last/1";', ' "stem/0";']
    edges = {(parent, child): float(width) for parent, child, width in
             re.findall(r'^  "(.+)" -> "(.+)" \[penwidth=(.+)\];$', text, re.M)}
    assert edges == {('head/2', 'last/4'): 3.5, ('head/2', 'last/1'): 1.5, ('last/4', 'stem/0'): 3.5,
                     ('last/1', 'stem/0'): 1.5}


def test_json_is_what_d3_links_by_id_or_the_whole_graph():
    d3, whole = json.loads(graph().to_json()), json.loads(graph().to_json(d3=False))
    assert set(d3) == {'nodes', 'links'}
    assert d3['nodes'][1] == {'id': 'last/4', 'layer': 'last', 'kernel': 4, 'strength': 0.75}
    assert d3['links'][0] == {'source': 'head/2', 'target': 'last/4', 'value': 0.75}
    assert {end for link in d3['links'] for end in (link['source'], link['target'])} == {
        node['id'] for node in d3['nodes']}
    assert whole == {'target': 2, 'rule': 'grad', 'select': ['topk', 2], 'layers': ['head', 'last', 'stem'],
                     'nodes': d3['nodes'], 'edges': d3['links']}


def test_the_author_s_dictionary_repeats_a_kernel_below_each_that_depends_on_it():
    assert graph().nested(depth=2) == {'2': {'last/4': ['stem/0'], 'last/1': ['stem/0']}}
    assert graph().nested(depth=1) == {'2': ['last/4', 'last/1']}
    assert graph().nested() == {'2': {'last/4': {'stem/0': []}, 'last/1': {'stem/0': []}}}
    deeper = graph()
    deeper.edges[FIRST, ('pixel', 0)] = 1.0
    assert deeper.nested() == {'2': {'last/4': {'stem/0': ['pixel/0']}, 'last/1': {'stem/0': ['pixel/0']}}}
    with pytest.raises(ValueError, match='depth must be at least 1, got 0'):
        graph().nested(depth=0)


def test_a_class_of_several_kernels_has_them_all_at_the_top():
    two = replace(graph(), nodes={('head', 2): 0.5, ('head', 7): 0.5, **graph().nodes})
    two.edges[('head', 7), WEAK] = 0.5
    assert two.nested(depth=1) == {'2': {'head/2': ['last/4', 'last/1'], 'head/7': ['last/1']}}
    two = replace(graph(), nodes={('distilled', 2): 1.0, **graph().nodes})  # of two layers, as DeiT's heads
    two.edges[('distilled', 2), WEAK] = 0.5
    assert two.nested(depth=1) == {'2': {'distilled/2': ['last/1'], 'head/2': ['last/4', 'last/1']}}


# Files.

def data_of(path):
    page = path.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_suffix_says_as_what_it_is_saved(tmp_path):
    for suffix in ('html', 'json', 'dot'):
        graph().save(tmp_path / f'graph.{suffix}')
    assert (tmp_path / 'graph.json').read_text() == graph().to_json()
    assert (tmp_path / 'graph.dot').read_text() == graph().to_dot()
    assert (tmp_path / 'graph.html').read_text().startswith('<!doctype html>')
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / 'graph.html'
    path.write_text('old')
    with pytest.raises(ValueError, match='path must end with .html, .json, .dot, got .*svg'):
        graph().save(tmp_path / 'graph.svg')
    with pytest.raises(FileNotFoundError, match='path must be in a folder that exists, got .*none'):
        graph().save(tmp_path / 'none' / 'graph.json')
    for shape in ((2, 3, 4, 4), (3, 4, 4)):
        with pytest.raises(ValueError, match=rf'inputs must be one image .* got \({shape[0]}, '):
            graph().save(path, torch.zeros(shape))
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_the_page_needs_nothing_else_and_no_name_ends_its_script(tmp_path):
    graph(clip=True).save(tmp_path / 'graph.html', torch.rand(1, 3, 5, 8, 8), names=['', '', '</script><b>'])
    page = (tmp_path / 'graph.html').read_text()
    assert not re.search(r'(src|href)=|https?://(?!www.w3.org/2000/svg)|@import|</script><b>', page)
    data = data_of(tmp_path / 'graph.html')
    assert data['title'] == '</script><b> (class 2)' and data['layers'] == ['head', 'last', 'stem']
    assert [node['tube'] for node in data['nodes']] == [None, 0, 1, None]
    assert [len(tube) for tube in data['tubes']] == [2, 2] and len(data['frames']) == data['length'] == 5
    assert data['edges'] == [[0, 1, 0.75], [0, 2, 0.25], [1, 3, 0.75], [2, 3, 0.25]]


def test_tubes_are_small_in_the_page_and_the_same_one_is_there_once(tmp_path):
    large = graph(rule='paper')
    large.maps['last', 0] = large.maps['last', 1] = torch.rand(500, 300, generator=torch.Generator().manual_seed(0))
    large.save(tmp_path / 'graph.html')
    (tube,), = data_of(tmp_path / 'graph.html')['tubes']  # both are the same one, once scaled
    assert 500 < len(tube) < 2000


# In a browser.

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium')
DRIVER = '''
const click = id => document.getElementById(id).dispatchEvent(new MouseEvent('click', {bubbles: true}));
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
const slide = (id, value) => { get(id).value = value; get(id).oninput(); };
const states = () => Object.fromEntries(nodes.map(({element}) =>
  [element.id, element.style.display === 'none' ? 'hidden' : element.getAttribute('class').slice(7)]));
const boxes = kind => [...document.querySelectorAll(kind)].map(item => item.getBoundingClientRect())
  .filter(box => box.width).map(box => [box.left, box.top, box.right, box.bottom]);
const pixels = pen => [...pen.getImageData(0, 0, pen.canvas.width, pen.canvas.height).data];
// Chromium's virtual time waits for images to load, not for threads that decode them.
HTMLImageElement.prototype.decode = async function () {
  if (!this.complete) await new Promise(done => this.addEventListener('load', done));
};
onload = async () => {
  update();
  const found = [];
  for (const [act, look] of [STEPS]) {
    act();
    await new Promise(done => setTimeout(done, 200));
    found.push(look());
  }
  document.body.textContent = JSON.stringify(found);
};
'''


def browse(path, *steps, size=(1280, 800)):
    """What is seen in the page after each of the ``steps``, pairs of what is done there and what is looked at."""
    script = DRIVER.replace('STEPS', ', '.join(f'[() => {{ {act} }}, () => {look}]' for act, look in steps))
    path.with_name('driven.html').write_text(path.read_text().replace('</html>', f'<script>{script}</script></html>'))
    run = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=5000',
                          f'--window-size={size[0]},{size[1]}', '--dump-dom', path.with_name('driven.html').as_uri()],
                         check=True, capture_output=True, timeout=120, text=True)
    return json.loads(html.unescape(re.search('<body>(.*)</body>', run.stdout, re.S)[1]))


def where(pixels, channel):
    """The rows of a square picture's pixels in which a channel is far above the others."""
    pixels = np.array(pixels).reshape(-1, 4)[:, :3]
    return (pixels[:, channel] - np.delete(pixels, channel, 1).max(1) > 60).nonzero()[0] // int(len(pixels) ** 0.5)


@in_a_browser
def test_a_click_shows_the_kernel_s_edges_both_ways_and_its_tube_over_the_image(tmp_path):
    half = torch.full((1, 3, 16, 16), 0.5)
    graph().save(tmp_path / 'graph.html', half, mean=(0, 0, 0), std=(1, 1, 1), names=['', '', 'cup'])
    plain, strong, weak, edges, state, text = browse(
        tmp_path / 'graph.html', ('', 'pixels(pen)'), ("click('last/4')", 'pixels(pen)'),
        ("click('last/1')", 'pixels(pen)'), ('', 'pixels(lines)'), ('', 'states()'),
        ('', "document.querySelector('aside').innerText"))
    assert set(plain) == {128, 255}
    top, bottom = where(strong, channel=0), where(weak, channel=0)
    assert len(top) > 500 and top.max() < 224 / 2 < bottom.min() and len(bottom) > 500
    assert len(where(weak, channel=2)) > 20000
    assert len(where(edges, channel=0)) > 100 and len(where(edges, channel=2)) > 100
    assert state == {'head/2': 'above', 'last/4': 'far', 'last/1': 'active', 'stem/0': 'below'}
    assert re.search(r'^cup \(class 2\)\n', text)
    assert re.search(r'last/1: strength 0.25\n+Gives to head/2 \(0.25\)\n+Depends on stem/0 \(0.25\)', text)


@in_a_browser
def test_the_page_is_used_by_keys_and_sliders(tmp_path):
    graph(clip=True).save(tmp_path / 'graph.html', torch.rand(1, 3, 5, 16, 16))
    right, reached, none, pruned, frame, early, late = browse(
        tmp_path / 'graph.html', ("click('head/2'); press('ArrowDown'); press('ArrowRight')", 'states()'),
        ('', '[...document.querySelectorAll("[role=button][tabindex=\'0\']")].map(item => item.id)'),
        ("press('Escape')", 'states()'), ("slide('least', 90)", 'states()'),
        ("slide('least', 0); slide('time', 4)", "get('number').textContent"),
        ("click('last/1'); slide('alpha', 100); slide('time', 0)", 'pixels(pen)'), ("slide('time', 4)", 'pixels(pen)'))
    assert [name for name, is_ in right.items() if is_ == 'active'] == reached == ['last/1']
    assert set(none.values()) == {''} and [name for name, is_ in pruned.items() if is_ == 'hidden'] == ['last/1']
    assert frame == '5 / 5'
    assert len(where(early, channel=0)) == 0 and len(where(late, channel=0)) > 500  # it is in the last frame only


@in_a_browser
@pytest.mark.parametrize('layers, kernels, size', [(22, 5, (1280, 500)), (54, 12, (1280, 800)), (22, 100, (1280, 800))])
def test_no_label_lies_on_another_and_no_circle_on_another(tmp_path, layers, kernels, size):
    nodes = {(f'layer{layer}.downsample.conv', kernel + 1000): 2 ** -kernel if layer % 2 else 1 / kernels
             for layer in range(layers) for kernel in range(kernels)}
    ClassGraph(7, 'grad', ('topk', 5), nodes).save(tmp_path / 'graph.html')
    texts, circles = map(np.array, browse(tmp_path / 'graph.html', ('', "boxes('#nodes text')"),
                                          ('', "boxes('circle')"), size=size))
    assert len(texts) == layers * (1 if kernels == 100 else kernels + 1) and len(circles) == layers * kernels
    for boxes in (texts, circles):
        left, top, right, bottom = boxes.T
        across = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
        along = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
        assert not np.triu((across > 0.1) & (along > 0.1), 1).any()
        assert left.min() >= 0 and right.max() <= size[0] - 330  # where the panel begins
