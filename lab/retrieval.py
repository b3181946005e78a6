"""
Retrieval with nano4M: which of 1,000 held-out scenes does a caption describe? Any modality can be the query.

    python -m lab.retrieval --out_dir=out/nano4m --pair=caption,rgb              recall both ways, by both measures
    python sample.py --out_dir=out/nano4m --retrieve=rgb --given=caption --text="two large red metal spheres"

By likelihood: a and b are near if ln p(b | a) - ln p(b) is large, where b is all tokens of the shorter of the two
modalities. The decoder's outputs for one a score any number of b. They are computed once and stored: a new a takes one
forward pass, a new b none. By embedding: the mean of the encoder's outputs, through a small network for each modality,
trained to match the two modalities of a scene (CLIP, arXiv 2103.00020, figure 3): one forward pass and one product.

The index, index_A_B_SPLIT.pt in the run's folder, holds both. It is made on its first use, and again for other weights.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import config
import lab
from config import UserError
from engine import checkpoints, devices
from lab.statistics import judged, table
from prepare import arrays

SETTINGS = dict(
    out_dir='out/nano4m',       # the run
    checkpoint='ckpt_last.pt',  # or ckpt_best.pt
    pair='caption,rgb',         # two of its modalities
    split='val',                # of the gallery and the queries
    device='auto',              # cuda, mps or cpu
)
WAYS = ('likelihood', 'embedding')
GALLERY = 1000  # held-out scenes
WIDTH = 64      # of an embedding


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods and embeddings of a nano4M

@torch.no_grad()
def decode_modality(model, known, name):
    """Decoder outputs (B, max_tokens, D) at all positions of modality `name`, given {name: (B, max_tokens) ids}, -1 if
    unknown; its own tokens are taken as unknown."""
    ids, token_slice = model.pack_modalities(known), model.modality[name].token_slice
    ids[:, token_slice] = -1
    position_ids = torch.arange(model.N, device=ids.device)[token_slice].expand(len(ids), -1)
    return model.decode(*model.encode_known(ids), position_ids)


@torch.no_grad()
def log_prob(model, decoder_out, name, ids):
    """ln p (B,) of ids (B, max_tokens) of modality `name`, its tokens taken as independent, given outputs of
    `decode_modality`. Queries have no content, so that the outputs of one pass serve any number of candidates."""
    ids = ids.to(decoder_out.device)
    nll = model.heads[name](decoder_out.flatten(0, 1), ids.clamp(min=0).flatten()).view(ids.shape)
    return -(nll * (ids >= 0)).sum(1)


@torch.no_grad()
def pooled_embedding(model, known):
    """Mean of the encoder's outputs over all known tokens: (B, D)."""
    context, position_ids = model.encode_known(model.pack_modalities(known))
    is_token = (position_ids < model.N)[..., None]
    return (context * is_token).sum(1) / is_token.sum(1).clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings that can be compared

def tower(D):
    return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, WIDTH))


def train_towers(features, device='cpu', steps=1500, batch_size=512, seed=0):
    """Two towers for features (n, D) of two modalities of the same scenes, trained so that the pair of a scene is more
    alike than all pairs of different scenes in the batch; returned on the CPU."""
    n, features = len(features[0]), [f.to(device) for f in features]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's: the same weights and batches on every device
        towers = nn.ModuleList(tower(f.size(1)) for f in features).to(device)
        batches = torch.stack([torch.randint(n, (min(batch_size, n),)) for _ in range(steps)]).to(device)
    scale = nn.Parameter(torch.tensor(10.0, device=device).log())
    optimizer = torch.optim.AdamW([*towers.parameters(), scale], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for rows in tqdm(batches, desc='train towers', unit='step', leave=False):
        a, b = (F.normalize(t(f[rows]), dim=1) for t, f in zip(towers, features))
        logits, own = scale.clamp(max=5).exp() * a @ b.T, torch.arange(len(rows), device=device)
        loss = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return towers.requires_grad_(False).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# The index

def read_tokens(folder, split, name, n=None):
    """Token ids (n, max_tokens) of a modality, of all samples if n is None; the first view if there are several. Raises
    UserError."""
    ids = arrays.load(Path(folder, split, f'{name}.npy'))[:n].astype(np.int64)
    return torch.from_numpy(ids[:, 0] if ids.ndim == 3 else ids)


def in_parts(function, ids, size=250):
    return torch.cat([function(part) for part in ids.split(size)])


def embeddings(model, name, ids):
    """Pooled embeddings (n, D), on the CPU, of ids (n, max_tokens) of a modality."""
    return in_parts(lambda part: pooled_embedding(model, {name: part}).float().cpu(), ids)


def make_index(model, folder, names, split):
    """All that queries need: tokens, the decoder's outputs, towers and embeddings. names: the longer modality comes
    first."""
    source, target = names
    ids = {name: read_tokens(folder, split, name, GALLERY) for name in names}
    if not len(ids[target]):
        raise UserError(f'{folder}/{split}: an empty gallery; prepare some held-out samples')
    decoder_out = in_parts(lambda part: decode_modality(model, {source: part}, target).float().cpu(), ids[source])
    uncond = decode_modality(model, {source: torch.full_like(ids[source][:1], -1)}, target)
    prior = in_parts(lambda part: log_prob(model, uncond.expand(len(part), -1, -1), target, part).float().cpu(),
                     ids[target])
    features = [embeddings(model, name, read_tokens(folder, 'train', name, 20_000)) for name in names]
    towers = train_towers(features, model.rope.device)
    index = dict(names=list(names), split=split, n=len(ids[target]), ids=ids, decoder_out=decoder_out.half(),
                 prior=prior, towers=[t.state_dict() for t in towers])
    return index | dict(vectors={name: embed(model, index, name, ids[name]) for name in names})


def digest(model):
    """SHA-256 of a model's weights: the same in ckpt_last.pt, ckpt_best.pt or a copy if they hold the same weights."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def open_index(model, folder, checkpoint, a, b, split):
    """The index of modalities a and b beside this checkpoint (a path), made if it is missing, damaged or of other
    weights."""
    sizes = {m.name: m.max_tokens for m in model.modalities}
    names = sorted((a, b), key=lambda name: (-sizes[name], name))  # the shorter is scored given the longer
    path, key = checkpoint.parent / f'index_{names[0]}_{names[1]}_{split}.pt', digest(model)
    try:
        index = torch.load(path, weights_only=True)
        if index['weights'] == key:
            return index
        reason = 'is of other weights'
    except FileNotFoundError:
        reason = 'is missing'
    except Exception as error:  # the unpickler fails in many ways
        reason = f'is damaged ({type(error).__name__})'
    print(f'{path} {reason}: making it', flush=True)
    index = make_index(model, folder, names, split) | dict(weights=key)
    checkpoints.save(path, index)
    return index


def embed(model, index, name, ids):
    """Embeddings (n, WIDTH) of length 1."""
    net = tower(model.config.n_embd)
    net.load_state_dict(index['towers'][index['names'].index(name)])
    with torch.no_grad():
        return F.normalize(net(embeddings(model, name, ids)), dim=1)


def nearness(model, index, name, ids, by='likelihood'):
    """How near queries ids (q, max_tokens) of modality `name` are to all n items of the other one: (q, n). For the
    shorter modality ln p(query) is left out, which is the same for all items."""
    source, target = index['names']
    if by == 'embedding':
        return embed(model, index, name, ids) @ index['vectors'][target if name == source else source].T
    if name == source:
        own = in_parts(lambda part: decode_modality(model, {source: part}, target), ids)
        candidates = index['ids'][target]
    else:
        stored = index['decoder_out'].float().to(model.rope.device)
    rows = []
    for i in tqdm(range(len(ids)), desc=f'queries of {name}', unit='query', leave=False, disable=len(ids) < 50):
        if name == source:
            row = log_prob(model, own[i].expand(len(candidates), -1, -1), target, candidates).cpu() - index['prior']
        else:
            row = log_prob(model, stored, target, ids[i].expand(len(stored), -1)).cpu()
        rows.append(row.float())
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Recall

def hits(near, same, k):
    """Of each query (n,), whether one of its k nearest is the one it belongs to, or equal to it."""
    return same.gather(1, near.topk(min(k, near.size(1))).indices).any(1)


def recalls(model, index):
    """{'a>b/recall at k of n': dict(parts=(n, 1, 2), baseline=by chance)} both ways, by both measures. Equal tokens of
    the shorter modality count as the same."""
    source, target = index['names']
    ids, found = index['ids'], {}
    same = (ids[target][:, None] == ids[target][None]).all(-1)
    wrong, n = (~same).sum(1), index['n']
    pairs = nearness(model, index, source, ids[source])  # serves both ways
    for by, near in (('', pairs), (' by embedding', index['vectors'][source] @ index['vectors'][target].T)):
        for way, rows in ((f'{source}>{target}', near), (f'{target}>{source}', near.T)):
            for k in (1, 5, 10):
                hit = hits(rows, same, k).double()
                miss = torch.stack([(wrong - i).clamp(min=0) / (n - i) for i in range(min(k, n))]).prod(0)  # all wrong
                found[f'{way}/recall at {k} of {n}{by}'] = dict(
                    parts=torch.stack((hit, torch.ones_like(hit)), -1)[:, None].numpy(),
                    baseline=1 - miss.mean().item())
    return found


@torch.inference_mode(False)
def main(*arguments, **overrides):
    settings = config.apply(config.read(arguments, overrides), SETTINGS)
    device = devices.find(settings['device'])
    devices.set_up(device, training=False)
    path = Path(settings['out_dir'], settings['checkpoint'])
    names = [name.strip() for name in settings['pair'].split(',')]
    run = lab.open_run(path, device, settings['split'])
    if lab.chapter_of(run.model) != 'fourm' or len({*names} & {*run.model.batch_keys}) != 2 or len(names) != 2:
        raise UserError(f'pair={settings["pair"]!r}: two modalities of a run of fourm, as in "caption,rgb"')
    index = open_index(run.model, run.folder, path, *names, settings['split'])
    print(table(judged(recalls(run.model, index))))


if __name__ == '__main__':
    config.run(main)
