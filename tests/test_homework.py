"""Homework: solutions pass, wrong but plausible answers do not and are told why, and no student's file harms the grader."""
import ast
import functools
import os
import re
import subprocess
import sys

import pytest

from config import UserError
from tests import homework
from tests.conftest import ROOT

# exercise, what stands in its body, what a mistake puts there, words of the reason
MUTANTS = dict(
    gpt=[
        ('MLP.forward', 'x * x', 'x', 'relu2'),
        ('MLP.forward', "approximate='tanh'", "approximate='none'", 'gelu_tanh'),
        ('MLP.forward', 'gate, x =', 'x, gate =', 'swiglu'),
        ('rotate', 'a * cos - b * sin, a * sin + b * cos', 'a * sin - b * cos, a * cos + b * sin', '90 degrees'),
        ('rotate', 'a * cos - b * sin, a * sin + b * cos', 'a * cos + b * sin, b * cos - a * sin', '90 degrees'),
        ('rotate', 'x.chunk(2, dim=-1)', '(x[..., 0::2], x[..., 1::2])', 'turned'),
        ('Attention.forward', 'is_causal=causal', 'is_causal=False', 'no place sees its future'),
        ('Attention.forward', 'mask, is_causal=causal', 'torch.ones(q.size(2), k.size(2)).tril(1) > 0 if causal else mask',
         'no place sees its future'),
        ('Attention.forward', 'mask, is_causal=causal', 'torch.ones(q.size(2), k.size(2)).tril(-1) > 0 if causal else mask',
         'sees itself'),
        ('Attention.forward', 'is_causal=causal', 'is_causal=True', 'every place should see every other'),
        ('Attention.forward', 'scale=scale, ', '', 'causal attention'),
        ('Attention.forward', 'y = F.scaled', 'y = (q @ k.mT * scale).softmax(-2) @ v  #', 'no place sees its future'),
        ('Attention.forward', '12 / self.head_size', '12 / self.head_size ** 0.5', 'causal attention'),
        ('Attention.forward', 'self.turned(qk, turn)', 'rotate(qk, *turn)', 'causal attention'),
        ('Attention.forward', 'q, k = self.turned', 'k, q = self.turned', 'causal attention'),
        ('Attention.forward', 'self.turned(k, context_turn)', 'self.turned(k, turn)', 'line'),
        ('Attention.forward', 'k, v = cache.append(self, k, v)', 'cache.append(self, k, v)', 'fifth token'),
        ('Attention.forward', 'y.transpose(1, 2).flatten(2)', 'y.flatten(1).view(*x.shape)', 'causal'),
        ('Block.forward', 'x = x + self.dropout(self.attention', 'x = self.dropout(self.attention', 'behind the block'),
        ('Block.forward', 'self.mlp(norm(x, self.eps))', 'norm(self.mlp(x), self.eps)', 'behind the block'),
        ('Block.forward', 'causal=causal', 'causal=True', 'causal=False'),
        ('Block.forward', ', cache=cache', '', 'fourth token'),
        ('Block.forward', 'self.dropout(self.mlp(norm(x, self.eps)))', 'self.mlp(norm(x, self.eps))', 'dropout'),
        ('GPT.trunk', 'return norm(x, self.config.norm_eps)', 'return x', 'trunk of 6 tokens'),
        ('GPT.trunk', 'self.turn[:, places]', 'self.turn[:, :tokens.size(1)]', '3 + 1 + 2'),
        ('GPT.trunk', 'cache.filled += tokens.size(1)', 'cache.filled += 1', '3 + 1 + 2'),
        ('GPT.trunk', 'else (True, None', 'else (False, None', 'trunk of 6 tokens'),
        ('GPT.trunk', 'self.embed(tokens, cache, x)', 'self.embed(tokens, cache)', 'x is not read'),
        ('GPT.trunk', 'causal, mask, cache)', 'causal, None, cache)', '3 + 1 + 2'),
        ('GPT.forward', 'tokens[:, 1:].flatten()', 'tokens[:, :-1].flatten()', 'those that come next'),
        ('GPT.forward', 'total / count, logs', 'total / targets.numel(), logs', 'without a target'),
        ('GPT.forward', 'self.trunk(tokens[:, :-1])', 'self.trunk(tokens[:, 1:])', 'the loss'),
        ('GPT.forward', 'total.detach()', 'total', 'detached'),
        ('filter_logits', 'logits.float() / temperature', 'logits.float() * temperature', 'temperature 0.5'),
        ('filter_logits', '- ordered.softmax(-1)  #', '#', 'top_p'),
        ('filter_logits', '.gather(-1, index.argsort(-1))', '', 'top_p'),
        ('filter_logits', 'logits.topk(top_k).values[..., -1:]', 'logits.topk(top_k).values[..., :1]', 'top_k'),
        ('filter_logits', 'min_p * p.amax(-1, keepdim=True)', 'min_p', 'min_p'),
        ('filter_logits', 'ordered.softmax(-1)', '(ordered * temperature).softmax(-1)', 'temperature'),
        ('filter_logits', ' & (before > 0)', '', 'top_p'),
        ('filter_logits', 'check_sampling(', 'print(', 'ValueError'),
        ('decode', 'model.step(tokens, cache)', 'model.step(tokens[:, -1:], cache)', 'most probable tokens'),
        ('decode', 'tokens = drawn[:, None]', 'tokens = torch.cat((tokens, drawn[:, None]), 1)', 'most probable tokens'),
        ('decode', 'sample_token(logits, temperature', 'sample_token(logits, 1.0', 'most probable tokens'),
        ('decode', '.masked_fill(ended, -1)', '', 'with end='),
        ('decode', 'if end >= 0 and ended.all():', 'if False:', 'with end='),
        ('decode', 'ended |= drawn == end', 'ended = ended | (drawn == end)', 'in place'),
        ('decode', 'min_p, generator)', 'min_p)', 'generator'),
        ('GPT.stream', 'for part in parts:', 'for part in parts[:0]:', 'chunk=2'),
        ('GPT.stream', 'context = tokens[:, -T:]', 'context = tokens[:, -(T // 2):]', 'room for 8'),
        ('GPT.stream', 'torch.cat((tokens, torch.stack(new, dim=1)), dim=1)', 'torch.stack(new, dim=1)', 'room for 8'),
        ('GPT.stream', 'tokens[:, -max(1, T // 2):]', 'tokens[:, -T:]', 'room for 8'),
        ('GPT.stream', 'bool((context < 0).any())', 'False', 'prompts of 1 and 3'),
        ('GPT.stream', 'min_p, end, generator)', 'min_p, end, None)', 'generator'),
    ],
    maskgit=[
        ('hide', '.ceil()', '.floor()', 'should be hidden'),
        ('hide', '.clamp(min=1)', '', 'should be hidden'),
        ('hide', 'noise.masked_fill', '(-noise).masked_fill', 'smallest noise'),
        ('hide', 'present & (', '~present | ~(', 'not present'),
        ('hide', 'present.sum(1, keepdim=True)', 'present.size(1)', 'should be hidden'),
        ('hide', 'noise.masked_fill(~present, torch.inf)', 'noise', 'should be hidden'),
        ('MaskGIT.draw', '[:, -self.N:]', '[:, :self.N]', 'the last 6'),
        ('MaskGIT.draw', 'masked_fill(mask, -1)', 'masked_fill(~mask, -1)', 'hidden'),
        ('MaskGIT.draw', '1 / (mask.sum(1) * len(mask))', '(1 / mask.sum()).expand(len(mask))', 'weight'),
        ('MaskGIT.draw', '1 / (mask.sum(1) * len(mask))', '1 / (present.sum(1) * len(mask))', 'weight'),
        ('MaskGIT.draw', 'bound if self.config.bound else each', 'bound', 'weight'),
        ('MaskGIT.draw', 'ids=tokens.flatten()[rows]', 'ids=rows % self.N', 'ids'),
        ('MaskGIT.draw', '< self.config.label_dropout', '> self.config.label_dropout', 'drop'),
        ('MaskGIT.forward', "(nll * batch['weight']).sum()", 'nll.mean()', 'all hidden tokens together'),
        ('MaskGIT.forward', ' and self.training', '', 'not in training'),
        ('MaskGIT.forward', "classes.masked_fill(batch['drop']", "classes.masked_fill(~batch['drop']", 'in training'),
        ('MaskGIT.forward', 'loss.detach() * B', 'loss.detach()', "logs['loss']"),
        ('MaskGIT.forward', "batch['bound_weight']", "batch['weight']", "logs['bound']"),
        ('MaskGIT.forward', 'self.trunk(tokens, classes)', 'self.trunk(tokens.clamp(min=0), classes)', 'the loss'),
        ('filled_after', '1 - torch.cos', 'torch.sin', 'cosine'),
        ('filled_after', '- 1e-9).ceil()', '- 1e-9).floor()', 'cosine'),
        ('filled_after', '.maximum(step)', '', 'cosine'),
        ('filled_after', '.minimum(total - steps + step)', '', 'constant'),
        ('filled_after', '-(-total * step // steps) if', '(total // steps) * step if', 'linear'),
        ('filled_after', '.minimum(total)', '', 'only 2'),
        ('unmask', 'turn = -log_p', 'turn = log_p', 'confidence'),
        ('unmask', 'unknown & (rank < now)', 'turn.expand(tokens.shape).argsort(-1).argsort(-1) < now', 'after step'),
        ('unmask', 'torch.where(unknown, turn.float(), torch.inf)', 'turn.expand(tokens.shape)', 'after step'),
        ('unmask', 'unknown & (rank < now), drawn', 'unknown, drawn', 'after step'),
        ('unmask', 'step / max(1, steps - 1)', 'step / steps', 'progress'),
        ('unmask', '(1 - progress) * ', '', 'fades'),
        ('unmask', "- (total - unknown.sum(1, keepdim=True))", '', 'after step'),
        ('unmask', 'yield tokens', 'yield drawn', 'given'),
        ('unmask', 'torch.rand(tokens.shape, generator=generator, ', 'torch.rand(tokens.shape, ', 'generator'),
        ('unmask', 'not 1 <= steps <= most', 'False', 'ValueError'),
    ],
    fourm=[
        ('budget_keys', '(rank + 0.5).log() - log_share[:, m]', '(rank + 0.5).log() + log_share[:, m]', 'share'),
        ('budget_keys', '(rank + 0.5).log() - log_share[:, m]', '(rank + 0.5) - log_share[:, m]', 'share'),
        ('budget_keys', '(rank + 0.5)', 'rank.float()', 'next to nothing'),
        ('budget_keys', '.masked_fill(~available, 1)', '', 'share'),
        ('budget_keys', '.masked_fill(~available, torch.inf)', '', 'infinity'),
        ('budget_keys', 'ordered[:, m]', 'torch.tensor(False)', 'from the first'),
        ('budget_keys', 'ordered[:, m]', 'torch.tensor(True)', 'at random'),
        ('draw_masks', 'budget_keys(left, ', 'budget_keys(present, ', 'both'),
        ('draw_masks', 'torch.where(kind < config.empty, 0, K)', 'K', 'empty'),
        ('draw_masks', 'torch.where(whole, log_share, ', 'torch.where(kind < 0, log_share, ', 'whole'),
        ('draw_masks', '(random(B, n) < 0.75)', '(random(B, n) < 0)', 'their beginning'),
        ('draw_masks', 'generator), M, M)', 'generator), M, limit)', 'target slots'),
        ('draw_masks', '(kind >= config.empty) & (kind < config.empty + config.whole)', 'kind < config.whole', 'without input'),
        ('draw_masks', 'torch.randint(len(alphas), (2, B), generator=generator)', 'torch.zeros(2, B).long()', 'alphas'),
        ('FourM.encode', 'return norm(x) + place', 'return norm(x)', 'place is missing'),
        ('FourM.encode', ' + self.offset[m]', '', 'before the blocks'),
        ('FourM.encode', '.sum(-2)', '.mean(-2)', 'before the blocks'),
        ('FourM.encode', 'self.turns(index)', 'self.turns(torch.arange(index.size(1)).expand_as(index))', 'encoder'),
        ('FourM.encode', 'norm(self.embedding(digits).sum(-2) + place)', 'self.embedding(digits).sum(-2) + place', 'blocks'),
        ('FourM.decode', 'self.query_embedding', 'self.place_embedding', 'before the blocks'),
        ('FourM.decode', 'block(x, turn, context, context_turn)', 'block(x, turn, x, turn)', 'context'),
        ('FourM.decode', 'self.turns(context_index)', 'self.turns(index)', 'line'),
        ('FourM.decode', 'return norm(x)', 'return x', 'answers'),
        ('FourM.draw', 'count * (count > 0).sum(0) * len(ids)', 'count.sum(0).expand_as(count) * len(ids)', 'weight'),
        ('FourM.draw', 'count * (count > 0).sum(0) * len(ids)', 'count * len(self.modalities) * len(ids)', 'weight'),
        ('FourM.draw', 'flat = ids.gather(1, targets)', 'flat = ids.gather(1, targets).roll(1, 1)', 'ids_'),
        ('FourM.draw', 'input_ids=ids.gather(1, inputs)', 'input_ids=inputs', 'input_ids'),
        ('FourM.draw', 'generator=shared', 'generator=generator', 'shared'),
        ('FourM.draw', 'F.pad(w.repeat_interleave(targets.size(1))[rows], (0, spare))',
         'F.pad(w.repeat_interleave(targets.size(1))[rows], (0, spare), value=1)', 'weight 0'),
        ('FourM.forward', '(nll * weight).sum()', 'nll.mean() / len(self.modalities)', 'the loss'),
        ('FourM.forward', '(nll * weight).sum()', '(nll * (weight > 0)).sum() / targets.numel()', 'the loss'),
        ('FourM.forward', 'self.decode(self.encode(batch[\'input_ids\'], inputs), inputs, targets)',
         'self.decode(self.encode(batch[\'input_ids\'], inputs), inputs, targets).roll(1, 0)', 'the loss'),
        ('FourM.forward', '(nll.detach() * real).sum()', 'nll.detach().sum()', 'logs'),
        ('FourM.fill', 'ids[:, m.places] = tokens', 'pass', 'filled before'),
        ('FourM.fill', 'steps = min(steps, unknown)', '', 'ValueError'),
        ('FourM.fill', 'min(steps, unknown)', 'unknown', 'steps'),
        ('FourM.fill', '*_, ids[:, m.places] =', '*_, _ =', 'in place'),
        ('FourM.fill', 'm.grid, steps, order', "m.grid, steps, 'random'", 'raster'),
        ('FourM.fill', ', generator=generator)', ')', 'from the generator'),
        ('FourM.generate', 'self.fill(ids,', 'self.fill(self.join(given),', 'conditions'),
        ('FourM.generate', 'if m.is_text', 'if False', 'write'),
        ('FourM.generate', 'for name in targets]', 'for name in self.fields]', 'in their order'),
        ('FourM.generate', ' if m.name in targets}', '}', 'returns'),
        ('FourM.generate', 'between(guidance_start, guidance, progress)', 'guidance', 'guidance'),
        ('FourM.generate', 'between(temperature, temperature_end, progress)', 'temperature_end', 'temperature'),
        ('FourM.generate', 'self.draw_tokens(ids,', 'self.draw_tokens(self.join(given),', 'being filled'),
    ],
    vlm=[
        ('pixel_shuffle', 'F.pixel_unshuffle(x, pool).flatten(2).transpose(1, 2)',
         'x.flatten(2).transpose(1, 2).reshape(x.size(0), -1, pool ** 2 * x.size(1))', 'square'),
        ('pixel_shuffle', 'x.transpose(1, 2).unflatten(2, (side, side))', 'x.mT.unflatten(2, (side, side)).mT', 'square'),
        ('pixel_shuffle', '.flatten(2)', '.flatten(2).unflatten(1, (-1, pool ** 2)).transpose(1, 2).flatten(1, 2)', 'the order'),
        ('VLM.look', 'pixel_shuffle(x, self.config.pool)', 'pixel_shuffle(x, self.config.pool).flip(1)', 'what is read of'),
        ('VLM.look', 'reshape(len(images), -1,', 'reshape(-1, self.P,', '2 pictures a row'),
        ('VLM.look', 'pixel_shuffle(x, self.config.pool)', 'x[:, ::self.config.pool ** 2].repeat(1, 1, self.config.pool ** 2)',
         'what is read of'),
        ('make_room', 'torch.where(image, P, 1)', 'torch.where(image, P + 1, 1)', 'places'),
        ('make_room', 'torch.where(image, P, 1)', 'torch.where(image, 1, P)', 'places'),
        ('make_room', '!= n_images', '> n_images', 'ValueError'),
        ('VLM.trunk', 'self.language.trunk(tokens, cache, x)', 'self.language.trunk(tokens, cache)', 'seen'),
        ('VLM.trunk', 'self.language.trunk(tokens, cache, x)', 'self.language.trunk(tokens, None, x)', 'cache'),
        ('VLM.trunk', 'tokens == self.config.image_token', '(torch.arange(tokens.size(1)) < seen.size(1)).expand(tokens.shape)',
         'behind two words'),
        ('VLM.trunk', '.view_as(x), x)', '.view_as(x) + x, x)', 'picture'),
        ('VLM.draw', 'torch.where(counted > 0, tokens, -1)', 'tokens', 'rows'),
        ('VLM.draw', 'tokens, -1)[:, 1:, None]', 'tokens, -1)[:, :-1, None]', 'rows'),
        ('VLM.draw', 'real.sum((1, 2), keepdim=True).clamp(min=1) / len(tokens)', 'real.sum()', 'weight'),
        ('VLM.draw', 'real.sum((1, 2), keepdim=True)', '(tokens >= 0).sum(1).view(-1, 1, 1)', 'weight'),
        ('VLM.draw', "(batch[name].gather(1, place) for name in ('tokens', 'counted'))",
         "(batch['tokens'].gather(1, place), F.pad(batch['counted'], (0, place.size(1) - batch['counted'].size(1))))", 'rows'),
        ('VLM.draw', 'torch.where(counted > 0, tokens, -1)', 'torch.where(counted > 0, tokens.clamp(min=0), -1)', 'rows'),
        ('VLM.read', 'cache.repeat(n)', 'pass', 'cannot be used'),
        ('VLM.read', 'self.trunk(tokens, seen, cache)', 'self.trunk(tokens, None, cache)', 'after reading'),
        ('VLM.read', 'ragged=True', 'ragged=False', 'after reading'),
        ('VLM.read', ' or self.config.blind', '', 'blind'),
        ('VLM.step', 'logits[:, self.config.image_token] = -torch.inf', 'pass', 'picture'),
        ('VLM.step', 'self.language.step(tokens, cache)', 'self.language.logits(self.trunk(tokens)[:, -1])', 'after a picture'),
        ('VLM.step', 'self.language.step(tokens, cache)', 'self.language.logits(self.trunk(tokens, cache=cache)[:, 0])', 'after a picture'),
        ('VLM.stream', 'tokens.size(1) + 1)', 'tokens.size(1))', '11 have room'),
        ('VLM.stream', 'min(max_new_tokens, self.length - cache.filled - tokens.size(1) + 1)', 'max_new_tokens', 'out of bounds'),
        ('VLM.stream', 'tokens.size(1) + n - 1', 'tokens.size(1) + n', 'cache.length'),
        ('VLM.stream', 'decode(self, tokens', 'decode(self, tokens[:, -1:]', 'should come'),
        ('VLM.stream', 'decode(self, ', 'decode(self.language, ', 'picture'),
        ('VLM.stream', 'end, generator)', 'end, None)', 'generator'),
    ],
    flow=[
        ('path', 'noise - data', 'data - noise', 'from noise to data'),
        ('path', '(1 - t) * data + t * noise', 't * data + (1 - t) * noise', 'z at t = 0 '),
        ('path', 't.view(-1, *[1] * (data.ndim - 1))', 't.view(-1, 1, 1, 1)', 'z of vectors'),
        ('sample_times', 'torch.special.ndtri(u).sigmoid()', 'torch.special.ndtri(u)', 'within 0 and 1'),
        ('sample_times', 'torch.special.ndtri(u).sigmoid()', 'u.sigmoid()', 'between 0.25 and 0.75'),
        ('sample_times', 'torch.randperm(n, generator=generator)', 'torch.arange(n)', 'order should be random'),
        ('sample_times', '(torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n',
         'torch.rand(n, generator=generator)', 'parts of equal probability'),
        ('sample_times', 'torch.rand(n, generator=generator)', 'torch.rand(n)', 'from `generator`'),
        ('sample_times', ', shift)', ', 1)', 'with shift 3'),
        ('Flow.forward', 'z, velocity = path', '_, velocity = path', 'line'),
        ('Flow.forward', "path(batch['data'], batch['noise'], t)", "path(batch['noise'], batch['data'], t)", 'shown of a sample'),
        ('Flow.forward', 'error.detach() + 0.01', 'error + 0.01', 'denominator'),
        ('Flow.forward', '.square()', '.abs()', 'the loss'),
        ('Flow.forward', 'plain & (quarter == i)', 'quarter == 3 - i', 't_0.5_0.75'),
        ('Flow.forward', 'error.detach().where(rows, 0)', 'error.where(rows, 0)', 'logs should be detached'),
        ('Block.forward', '(1 + gate) *', 'gate *', 'with no modulation'),
        ('Block.forward', 'shift, scale, gate,', 'scale, shift, gate,', 'a shift of the attention'),
        ('Block.forward', 'norm(x) * (1 + scale2) + shift2', 'norm(x * (1 + scale2) + shift2)', 'a shift of the MLP'),
        ('Block.forward', 'norm(x) * (1 + scale2) + shift2', 'norm(x) * scale2 + shift2', 'with no modulation'),
        ('euler', 'z + h', 'z - h', 'after a step'),
        ('euler', 'velocity(z, t)', 'velocity(z, t + h)', 'after a step'),
        ('solve', 'after - t', 't - after', 'the trajectory'),
        ('solve', 'trajectory[-1], t,', 'z, t,', 'the trajectory'),
        ('solve', 'stack(trajectory)', 'stack(trajectory[1:])', 'shape'),
        ('solve', 'evaluations * (len(times) - 1)', 'len(times) - 1', 'by midpoint'),
        ('guided', 'without + scale * (given - without)', 'scale * given', 'scale 0'),
        ('guided', 'without + scale * (given - without)', 'given + scale * (given - without)', 'scale 0'),
        ('guided', 'given, without =', 'without, given =', 'scale 0'),
        ('guided', ' or not interval[0] <= t <= interval[1]', '', 'outside of the interval'),
        ('guided', 'interval[0] <= t <= interval[1]', 'interval[0] < t < interval[1]', 'end of the interval'),
        ('guided', 't if before is None else before', 't', 'with before'),
        ('guided', 'scale == 1 or ', '', 'scale 1 needs one evaluation'),
    ],
)


# right answers, written otherwise than the solutions: as slowly and plainly as one likes
OTHERWISE = [
    ('gpt', 'Attention.forward', """
        source = x if context is None else context
        a, b = self.n_head * self.head_size, self.n_kv_head * self.head_size
        q = self.q(x) if context is not None else self.qkv(x)[..., :a]
        k, v = self.qkv(source)[..., -2 * b:-b], self.qkv(source)[..., -b:]
        q, k, v = (y.view(len(x), y.size(1), -1, self.head_size).permute(0, 2, 1, 3) for y in (q, k, v))
        if self.qk_norm:
            q, k = (y / (y ** 2).mean(-1, keepdim=True).add(1e-6).sqrt() for y in (q, k))
        q, k = rotate(q, turn[0], turn[1]), rotate(k, *(turn if context is None else context_turn))
        if cache is not None:
            k, v = cache.append(self, k, v)
        k, v = (y.repeat_interleave(q.size(1) // k.size(1), 1) for y in (k, v))
        logits = torch.einsum('bhqd,bhkd->bhqk', q, k) * (12 / self.head_size if self.qk_norm else self.head_size ** -0.5)
        if causal:
            logits = logits.masked_fill(torch.ones(x.size(1), x.size(1)).triu(1).bool(), -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        return self.out(torch.einsum('bhqk,bhkd->bqhd', logits.softmax(-1), v).reshape(x.shape))
"""),
    ('maskgit', 'hide', """
    mask = torch.zeros_like(present)
    for b in range(len(present)):
        there = sorted(present[b].nonzero()[:, 0].tolist(), key=lambda i: noise[b, i])
        ratio = float(LAWS[law][0](u[b, 0]))
        mask[b, there[:max(1, math.ceil(ratio * len(there) - 1e-6))]] = True
    return mask
"""),
    ('fourm', 'FourM.encode', """
        m, place = self.modality_of[index], self.place_embedding(index)
        x = place.clone()
        for d in range(self.levels.size(1)):
            x += self.embedding(ids // self.divisor[m, d] % self.levels[m, d] + self.offset[m, d])
        x = norm(x)
        for block in self.encoder:
            x = block(x, self.turns(index))
        return place + norm(x)
"""),
    ('flow', 'sample_times', """
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    u = u[torch.randperm(n, generator=generator)].clamp(1e-6, 1 - 1e-6)
    return shifted(u if kind == 'uniform' else 1 / (1 + torch.exp(-2 ** 0.5 * torch.erfinv(2 * u - 1))), shift)
"""),
    ('vlm', 'pixel_shuffle', """
    n = round(x.size(1) ** 0.5) // pool
    x = x.view(len(x), n, pool, n, pool, x.size(2)).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(len(x), n * n, -1)
"""),
]


parse = functools.cache(ast.parse)


def mutant(chapter, name, old, new):
    """The chapter's text with a mistake in one exercise."""
    text = source(chapter)
    lines, node = text.splitlines(True), homework.find(parse(text), name)
    body = ''.join(lines[node.lineno - 1:node.end_lineno])
    assert old in body, f'{name} has changed: {old!r} is not in it'
    lines[node.lineno - 1:node.end_lineno] = [body.replace(old, new)]
    return ''.join(lines)


def source(chapter):
    return (ROOT / f'{chapter}.py').read_text()


def attempt(chapter, name, text):
    return homework.attempt(chapter, name, text, ROOT / f'{chapter}.py')


@pytest.mark.parametrize('chapter', MUTANTS)
def test_mistakes_are_told_from_solutions(chapter):
    """Of each exercise the solution passes, and at least two mistakes do not, each for the right reason."""
    mistakes = {}
    for name in homework.exercises(chapter):
        assert attempt(chapter, name, source(chapter)) == '', name
    for name, old, new, words in MUTANTS[chapter]:
        said = attempt(chapter, name, mutant(chapter, name, old, new))
        assert said and words in said and '\n' not in said, (name, new, said)
        mistakes[name] = mistakes.get(name, 0) + 1
    assert all(mistakes.get(name, 0) >= 2 for name in homework.exercises(chapter))


@pytest.mark.parametrize('chapter, name, body', OTHERWISE)
def test_other_ways_are_right_too(chapter, name, body):
    lines = source(chapter).splitlines(True)
    lines[body_of(source(chapter), name)] = [body[1:]]
    assert attempt(chapter, name, ''.join(lines)) == ''


# ---------------------------------------------------------------------------------------------------------------------
# From blank to full marks

def body_of(text, name):
    """Where a function's body stands among the lines of a text: after its docstring, or its head."""
    node = homework.find(parse(text), name)
    first = node.body[ast.get_docstring(node) is not None]
    start, lines = first.lineno - 1, text.splitlines(True)
    while lines[start - 1].strip()[:1] in ('', '#'):
        start -= 1
    return slice(start, node.end_lineno)


def fill_in(text, chapter, name):
    """A text whose exercise of this name has the body of the solution."""
    lines, solution = text.splitlines(True), source(chapter)
    lines[body_of(text, name)] = solution.splitlines(True)[body_of(solution, name)]
    return ''.join(lines)


@pytest.mark.parametrize('chapter', homework.CHAPTERS)
def test_a_blank_chapter_is_the_chapter_but_for_its_exercises(chapter):
    text = homework.blank(source(chapter), chapter)
    exec(compile(text, 'blank', 'exec'), {'__name__': 'blank'})  # what is not asked for works
    assert all(len(line) <= 130 for line in {*text.splitlines()} - {*source(chapter).splitlines()})
    assert sum(points for points, _ in homework.exercises(chapter).values()) == 20
    for name in homework.exercises(chapter):
        assert attempt(chapter, name, text) == homework.BLANK
    for name in homework.exercises(chapter):
        text = fill_in(text, chapter, name)
    assert text == source(chapter)


def test_the_page_shows_a_blank_as_it_is():
    shown = re.search('```python\n(.*?)```', (ROOT / 'docs/homework.md').read_text(), re.S)[1]
    assert shown in homework.blank(source('fourm'), 'fourm')


def test_each_exercise_is_graded_by_itself():
    """Filled in one after the other: what is there passes, what is not yet is not attempted."""
    text, names = homework.blank(source('flow'), 'flow'), [*homework.exercises('flow')]
    for name, following in zip(names, [*names[1:], None]):
        text = fill_in(text, 'flow', name)
        assert attempt('flow', name, text) == '' and (following is None or attempt('flow', following, text) == homework.BLANK)


def test_what_is_deleted_is_missed_by_nobody_else():
    start = source('flow').index('def euler(')
    text = source('flow')[:start] + source('flow')[source('flow').index('def midpoint('):]
    assert attempt('flow', 'euler', text).startswith('flow.py has no function euler any more')
    assert attempt('flow', 'solve', text) == ''


def test_a_homework_never_overwrites(tmp_path, capsys):
    out = tmp_path / 'homework'
    homework.main('fourm', f'--out={out}')
    assert 'budget_keys, draw_masks, FourM.encode' in capsys.readouterr().out
    assert (out / 'fourm.py').read_text() == homework.blank(source('fourm'), 'fourm')
    assert (out / 'gpt.py').read_text() == source('gpt') and (out / 'tests/exercises/fourm.py').is_file()
    assert not (out / 'data').exists() and not (out / 'out').exists() and not (out / 'tests/test_homework.py').exists()
    (out / 'fourm.py').write_text('mine')
    for folder in (out, out / 'fourm.py'):
        with pytest.raises(UserError, match='is not an empty folder; nothing was written'):
            homework.main('fourm', out=str(folder))
    assert (out / 'fourm.py').read_text() == 'mine'


def test_in_a_students_copy_what_is_blank_is_named(tmp_path, monkeypatch):
    """There the other exercises cannot be replaced by solutions."""
    (tmp_path / 'flow.py').write_text(fill_in(homework.blank(source('flow'), 'flow'), 'flow', 'solve'))
    monkeypatch.setattr(homework, 'ROOT', tmp_path)
    homework.solutions.cache_clear()
    assert attempt('flow', 'solve', (tmp_path / 'flow.py').read_text()) == 'it needs euler, which is still blank'
    homework.solutions.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The command

def test_solutions_get_full_marks_wherever_it_is_run(tmp_path):
    command = [sys.executable, '-m', 'tests.homework', 'flow', f'--grade={ROOT}']
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.count(' passed') == 8
    assert done.stdout.endswith('20 of 20 points, 7 of 7 exercises passed\n')


EULER = 'return z + h * velocity(z, t)'


@pytest.mark.parametrize('old, new, words', [
    (EULER, 'return z + h * velocity(z, t', "flow.py, line {}: '(' was never closed"),
    (EULER, 'if h > 0: pass\n  return z', 'unindent does not match'),
    (EULER, 'return z * undefined', "flow.py, line {}: NameError: name 'undefined' is not defined"),
    (EULER, 'import sys; sys.exit(0)', 'flow.py, line {}: SystemExit: 0'),
    (EULER, 'pass', homework.BLANK),
    (EULER, 'print(z)', 'should be a tensor, but is NoneType'),
    (EULER, 'assert h > 0', 'flow.py, line {}: AssertionError'),
    (EULER, 'return euler(velocity, z, t, h)', 'flow.py, line {}: RecursionError'),
    (EULER, 'return my_step(velocity, z, t, h)\n\n\ndef my_step(velocity, z, t, h):\n    return z + h * velocity(z, t)', ''),
    (EULER, 'raise NotImplementedError("exercise euler: mine"); return z', 'flow.py, line {}: NotImplementedError'),
    ('def euler(velocity, z, t, h)', 'def euler(velocity, z, t)', 'euler cannot be used as it is: TypeError: euler() takes'),
    ('def euler(', 'def eule(', 'flow.py has no function euler any more'),
    ('import math\n', 'import math, no_such_package\n', 'flow.py, line {}: ModuleNotFoundError: No module named '),
    ('import math\n', 'exit()\n', 'flow.py, line {}: SystemExit'),
    ('import math\n', '\0', 'source code string cannot contain null bytes'),
    (None, '', 'flow.py has no function euler any more'),
])
def test_no_file_crashes_the_grader(old, new, words):
    text = source('flow')
    place = text.index(old) if old else 0
    line = text[:place].count('\n') + 1
    text = text[:place] + new + text[place + len(old):] if old else new
    said = attempt('flow', 'euler', text)
    assert said.startswith(words.format(line)) or words and words.format(line) in said, said
    assert bool(said) == bool(words)


@pytest.mark.parametrize('new, words', [
    ('while True: pass', 'still running after 1 s, in flow.py, line {}: an endless loop?'),
    ('import os; os._exit(0)', 'Python ended before the exercise did, with exit code 0'),
    ('print("noise"); import os; os.write(1, b"noise"); return input()', 'flow.py, line {}: EOFError'),
])
def test_no_program_stops_the_grader(tmp_path, capfd, new, words):
    path = tmp_path / 'flow.py'
    path.write_text(source('flow').replace(EULER, new))
    line = source('flow')[:source('flow').index(EULER)].count('\n') + 1
    assert homework.main('flow', grade=str(path), limit=1) == 1
    out, err = capfd.readouterr()
    assert '19 of 20 points, 6 of 7 exercises passed' in out and 'noise' not in out + err
    assert words.format(line) in ' '.join(out.split()), out


def test_a_file_that_cannot_be_read_has_one_reason(tmp_path, capsys):
    path = tmp_path / 'mine.py'
    path.write_text('def')
    assert homework.main('flow', grade=str(path)) == 7
    out = capsys.readouterr().out
    assert out.count('mine.py, line 1: invalid syntax; nothing can be graded') == 1 and out.count('failed: as above') == 6


@pytest.mark.parametrize('arguments, message', [
    ([], 'say one of --exercises, --out=FOLDER'),
    (['gpt'], 'say one of'),
    (['gpt', '--out=a', '--grade=b'], 'say one of'),
    (['--out=a'], 'which chapter\\? name one of gpt, maskgit, fourm, flow, vlm'),
    (['forum', '--exercises'], "there is no chapter 'forum': name one of .*; did you mean fourm?"),
    (['gpt', '--grades=a'], "unknown setting 'grades'; did you mean 'grade'"),
    (['gpt', '--grade=no/such'], '--grade takes the folder that gpt.py is in, or the file itself'),
])
def test_faults_on_the_command_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        homework.main(*arguments)
    assert '\n' not in str(error.value)


def test_the_list_of_exercises(capsys):
    homework.main('--exercises')
    every = capsys.readouterr().out
    homework.main('vlm', '--exercises')
    assert every.count('20 points') == 5 and every.endswith(capsys.readouterr().out)
