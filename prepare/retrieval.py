"""
Retrieval with nano4M: which of 1,000 held-out scenes does a sentence mean? Any modality asks, any other answers.

    python -m prepare.retrieval --out_dir=out/nano4m --pair=caption,rgb          recall both ways, by both measures
    python sample.py --out_dir=out/nano4m --retrieve=rgb --given=caption --text="two large red metal spheres"

By likelihood: a and b belong together where ln p(b | a) - ln p(b) is large, b all tokens of the shorter of the two modalities.
The answers of the decoder to a score any number of b; they are computed once and kept, so that a new a takes one pass of
the model, a new b none. By embedding: the mean of the encoder's outputs, through a small network a modality, trained on the
training scenes to tell which two belong together (CLIP, arXiv 2103.00020, figure 3): a query is one pass and one matrix product.

The index, index_A_B_SPLIT.pt in the run's folder, holds both; it is made when it is first asked for.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import config
from config import UserError
from prepare.report import judged, table
from train import check_data, find_device, load_model, read_meta, save_checkpoint, set_up

SETTINGS = dict(
    out_dir='out/nano4m', checkpoint='ckpt_last.pt',
    pair='caption,rgb',
    split='val',
    device='auto',
)
WAYS = ('likelihood', 'embedding')
GALLERY = 1000  # held-out scenes
WIDTH = 64      # of an embedding


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings that can be compared

def tower(D):
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, WIDTH))


def train_towers(features, steps=1500, batch_size=512, seed=0):
    """Two towers for features (n, D) of two modalities of the same scenes: the pair of a scene is to be more alike than all
    pairs of different scenes in the batch."""
    torch.manual_seed(seed)
    towers = nn.ModuleList(tower(f.size(1)) for f in features)
    scale = nn.Parameter(torch.tensor(10.0).log())
    optimizer = torch.optim.AdamW([*towers.parameters(), scale], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in tqdm(range(steps), desc='train towers', unit='step', leave=False):
        rows = torch.randint(len(features[0]), (min(batch_size, len(features[0])),))
        a, b = (F.normalize(t(f[rows]), dim=1) for t, f in zip(towers, features))
        logits, own = scale.clamp(max=5).exp() * a @ b.T, torch.arange(len(rows))
        loss = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return towers.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The index

def read_tokens(folder, split, name, n):
    """Token ids (n, size); where samples have several views, of the first."""
    ids = np.load(Path(folder, split, f'{name}.npy'), mmap_mode='r')[:n].astype(np.int64)
    return torch.from_numpy(ids[:, 0] if ids.ndim == 3 else ids)


def in_parts(function, ids, size=250):
    return torch.cat([function(part) for part in ids.split(size)])


def make_index(model, folder, names, split):
    """Everything that queries need: tokens, the decoder's answers, and the towers with their embeddings."""
    teller, told = names
    ids = {name: read_tokens(folder, split, name, GALLERY) for name in names}
    if not len(ids[told]):
        raise UserError(f'{folder}/{split}: an empty gallery; prepare some held-out samples')
    answers = in_parts(lambda part: model.ask({teller: part}, told).float().cpu(), ids[teller])
    nothing = model.ask({teller: torch.full_like(ids[teller][:1], -1)}, told)
    prior = in_parts(lambda part: model.log_prob(nothing.expand(len(part), -1, -1), told, part).float().cpu(), ids[told])
    features = [in_parts(lambda part: model.embed({name: part}).float().cpu(), read_tokens(folder, 'train', name, 20_000))
                for name in names]
    towers = train_towers(features)
    index = dict(names=list(names), split=split, n=len(ids[told]), ids=ids, answers=answers.half(), prior=prior,
                 towers=[t.state_dict() for t in towers])
    return index | dict(vectors={name: embed(model, index, name, ids[name]) for name in names})


def open_index(model, folder, checkpoint, a, b, split):
    """The index of two modalities beside this checkpoint, made now if there is none."""
    sizes = {m.name: m.size for m in model.modalities}
    names = sorted((a, b), key=lambda name: (-sizes[name], name))  # the longer one tells the shorter one: fewer tokens to score
    path = checkpoint.parent / f'index_{names[0]}_{names[1]}_{split}.pt'
    key = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    if not path.is_file():
        print(f'making {path}', flush=True)
        save_checkpoint(path, make_index(model, folder, names, split) | dict(checkpoint=key))
    try:
        index = torch.load(path, weights_only=True)
        if index['checkpoint'] == key:
            return index
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(f'{path}: damaged ({type(error).__name__}); delete it, it will be made anew')
    raise UserError(f'{path} is the index of another checkpoint; delete it, it will be made anew')


def embed(model, index, name, ids):
    """Embeddings (n, WIDTH) of length 1."""
    net = tower(model.config.n_embd)
    net.load_state_dict(index['towers'][index['names'].index(name)])
    with torch.no_grad():
        return F.normalize(net(in_parts(lambda part: model.embed({name: part}).float().cpu(), ids)), dim=1)


def nearness(model, index, name, ids, by='likelihood'):
    """How near the queries ids (q, size) of modality `name` are to all items of the other modality: (q, n). A query that is told
    by the gallery lacks ln p of itself, which is the same for all items."""
    teller, told = index['names']
    gallery = told if name == teller else teller
    if by == 'embedding':
        return embed(model, index, name, ids) @ index['vectors'][gallery].T
    if name == teller:
        own, candidates, prior = in_parts(lambda part: model.ask({teller: part}, told), ids), index['ids'][told], index['prior']
    else:
        kept = index['answers'].float().to(model.turn.device)
    rows = []
    for i in tqdm(range(len(ids)), desc=f'{name} > {gallery}', unit='query', leave=False, disable=len(ids) < 50):
        if name == teller:
            row = model.log_prob(own[i].expand(len(candidates), -1, -1), told, candidates).cpu() - prior
        else:
            row = model.log_prob(kept, told, ids[i].expand(len(kept), -1)).cpu()
        rows.append(row.float())
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Recall

def hits(near, same, k):
    """Of each query (n,), whether one of its k nearest is the one it belongs to, or equal to it."""
    return same.gather(1, near.topk(min(k, near.size(1))).indices).any(1)


def recalls(model, index):
    """{'a>b/recall at k of n': dict(parts=(n, 1, 2), baseline=by chance)} both ways, by both measures; equal tokens of the shorter
    modality count as the same."""
    teller, told = index['names']
    ids, found = index['ids'], {}
    same = (ids[told][:, None] == ids[told][None]).all(-1)
    wrong, n = (~same).sum(1), index['n']
    pairs = nearness(model, index, teller, ids[teller])  # serves both ways
    for by, near in (('', pairs), (' by embedding', index['vectors'][teller] @ index['vectors'][told].T)):
        for way, rows in ((f'{teller}>{told}', near), (f'{told}>{teller}', near.T)):
            for k in (1, 5, 10):
                hit = hits(rows, same, k).double()
                miss = torch.stack([(wrong - i).clamp(min=0) / (n - i) for i in range(min(k, n))]).prod(0)  # all k wrong
                found[f'{way}/recall at {k} of {n}{by}'] = dict(
                    parts=torch.stack((hit, torch.ones_like(hit)), -1)[:, None].numpy(), baseline=1 - miss.mean().item())
    return found


def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    device = find_device(settings['device'])
    set_up(device, training=False)
    path = Path(settings['out_dir'], settings['checkpoint'])
    model, checkpoint = load_model(path)
    names = settings['pair'].split(',')
    if type(model).__name__ != 'FourM' or len({*names} & {*model.fields}) != 2 or len(names) != 2:
        raise UserError(f'pair={settings["pair"]!r}: two modalities of a run of fourm, as in "caption,rgb"')
    folder = Path('data', checkpoint['settings']['dataset'])
    check_data(folder, read_meta(folder), checkpoint)
    index = open_index(model.to(device), folder, path, *names, settings['split'])
    print(table(judged(recalls(model, index))))


if __name__ == '__main__':
    config.run(main)
