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
        ('apply_rope', 'a * cos - b * sin, a * sin + b * cos', 'a * sin - b * cos, a * cos + b * sin', '90 degrees'),
        ('apply_rope', 'a * cos - b * sin, a * sin + b * cos', 'a * cos + b * sin, b * cos - a * sin', '90 degrees'),
        ('apply_rope', 'x.chunk(2, dim=-1)', '(x[..., 0::2], x[..., 1::2])', 'rotated'),
        ('Attention.forward', 'is_causal=causal', 'is_causal=False', 'no position attends to later ones'),
        ('Attention.forward', 'mask, is_causal=causal', 'torch.ones(q.size(2), k.size(2)).tril(1) > 0 if causal else mask',
         'no position attends to later ones'),
        ('Attention.forward', 'mask, is_causal=causal', 'torch.ones(q.size(2), k.size(2)).tril(-1) > 0 if causal else mask',
         'attends to itself'),
        ('Attention.forward', 'is_causal=causal', 'is_causal=True', 'every position should attend to every other'),
        ('Attention.forward', 'scale=scale, ', '', 'causal attention'),
        ('Attention.forward', 'y = F.scaled', 'y = (q @ k.mT * scale).softmax(-2) @ v  #', 'no position attends to later ones'),
        ('Attention.forward', '12 / self.head_dim', '12 / self.head_dim ** 0.5', 'causal attention'),
        ('Attention.forward', 'self.norm_and_rope(qk, rope)', 'apply_rope(qk, *rope)', 'causal attention'),
        ('Attention.forward', 'q, k = self.norm_and_rope', 'k, q = self.norm_and_rope', 'causal attention'),
        ('Attention.forward', 'self.norm_and_rope(k, context_rope)', 'self.norm_and_rope(k, rope)', 'line'),
        ('Attention.forward', 'else cache.update(self, k, v)', 'else (cache.update(self, k, v), (k, v))[1]', 'fifth token'),
        ('Attention.forward', 'y.transpose(1, 2).flatten(2)', 'y.flatten(1).view(*x.shape)', 'causal'),
        ('Block.forward', 'x = x + self.dropout(self.attention', 'x = self.dropout(self.attention', 'after the block'),
        ('Block.forward', 'self.mlp(rms_norm(x, self.eps))', 'rms_norm(self.mlp(x), self.eps)', 'after the block'),
        ('Block.forward', 'causal=causal', 'causal=True', 'causal=False'),
        ('Block.forward', ', cache=cache', '', 'fourth token'),
        ('Block.forward', 'self.dropout(self.mlp(rms_norm(x, self.eps)))', 'self.mlp(rms_norm(x, self.eps))', 'dropout'),
        ('GPT.backbone', 'return rms_norm(x, self.config.norm_eps)', 'return x', 'backbone of 6 tokens'),
        ('GPT.backbone', 'self.rope[:, position_ids]', 'self.rope[:, :tokens.size(1)]', '3 + 1 + 2'),
        ('GPT.backbone', 'cache.cur_len += tokens.size(1)', 'cache.cur_len += 1', '3 + 1 + 2'),
        ('GPT.backbone', 'else (True, None', 'else (False, None', 'backbone of 6 tokens'),
        ('GPT.backbone', 'self.embed(tokens, cache, inputs_embeds)', 'self.embed(tokens, cache)', 'inputs_embeds is not used'),
        ('GPT.backbone', 'causal, mask, cache)', 'causal, None, cache)', '3 + 1 + 2'),
        ('GPT.forward', 'tokens[:, 1:].flatten()', 'tokens[:, :-1].flatten()', 'not the next ones'),
        ('GPT.forward', 'total / count, logs', 'total / targets.numel(), logs', 'without a target'),
        ('GPT.forward', 'self.backbone(tokens[:, :-1])', 'self.backbone(tokens[:, 1:])', 'the loss'),
        ('GPT.forward', 'total.detach()', 'total', 'detached'),
        ('filter_logits', 'logits.float() / temperature', 'logits.float() * temperature', 'temperature 0.5'),
        ('filter_logits', '- ordered.softmax(-1)  #', '#', 'top_p'),
        ('filter_logits', '.gather(-1, index.argsort(-1))', '', 'top_p'),
        ('filter_logits', 'logits.topk(top_k).values[..., -1:]', 'logits.topk(top_k).values[..., :1]', 'top_k'),
        ('filter_logits', 'min_p * p.amax(-1, keepdim=True)', 'min_p', 'min_p'),
        ('filter_logits', 'ordered.softmax(-1)', '(ordered * temperature).softmax(-1)', 'temperature'),
        ('filter_logits', ' & (before > 0)', '', 'top_p'),
        ('filter_logits', 'raise ValueError(', 'print(', 'ValueError'),
        ('decode', 'model.step(tokens, cache)', 'model.step(tokens[:, -1:], cache)', 'most probable tokens'),
        ('decode', 'tokens = token[:, None]', 'tokens = torch.cat((tokens, token[:, None]), 1)', 'most probable tokens'),
        ('decode', 'sample_token(logits, temperature', 'sample_token(logits, 1.0', 'most probable tokens'),
        ('decode', '.masked_fill(finished, -1)', '', 'with eos_id='),
        ('decode', 'if eos_id >= 0 and finished.all():', 'if False:', 'with eos_id='),
        ('decode', 'finished |= token == eos_id', 'finished = finished | (token == eos_id)', 'in place'),
        ('decode', 'min_p, generator)', 'min_p)', 'same seed'),
        ('GPT.stream', ' and not (eos_id >= 0 and finished.all())', ' and not (eos_id >= 0 and finished.any())', 'eos_id='),
        ('GPT.stream', 'context = tokens[:, -T:]', 'context = tokens[:, -(T // 2):]', 'room for 8'),
        ('GPT.stream', 'tokens = torch.cat((tokens, token[:, None]), dim=1)', 'tokens = token[:, None]', 'room for 8'),
        ('GPT.stream', 'tokens[:, -max(1, T // 2):]', 'tokens[:, -T:]', 'room for 8'),
        ('GPT.stream', 'bool((context < 0).any())', 'False', 'prompts of 1 and 3'),
        ('GPT.stream', 'min_p, eos_id, generator)', 'min_p, eos_id, None)', 'same seed'),
    ],
    maskgit=[
        ('random_mask', '.ceil()', '.floor()', 'should be masked'),
        ('random_mask', '.clamp(min=1)', '', 'should be masked'),
        ('random_mask', 'noise.masked_fill', '(-noise).masked_fill', 'smallest noise'),
        ('random_mask', 'valid & (', '~valid | ~(', 'not valid'),
        ('random_mask', 'valid.sum(1, keepdim=True)', 'valid.size(1)', 'should be masked'),
        ('random_mask', 'noise.masked_fill(~valid, torch.inf)', 'noise', 'should be masked'),
        ('MaskGIT.prepare_batch', '[:, -self.N:]', '[:, :self.N]', 'the last 6'),
        ('MaskGIT.prepare_batch', 'masked_fill(mask, -1)', 'masked_fill(~mask, -1)', 'masked'),
        ('MaskGIT.prepare_batch', '1 / (mask.sum(1) * len(mask))', '(1 / mask.sum()).expand(len(mask))', 'weight'),
        ('MaskGIT.prepare_batch', '1 / (mask.sum(1) * len(mask))', '1 / (valid.sum(1) * len(mask))', 'weight'),
        ('MaskGIT.prepare_batch', 'elbo_weight if self.config.elbo else weight', 'elbo_weight', 'weight'),
        ('MaskGIT.prepare_batch', 'ids=tokens.flatten()[token_idx]', 'ids=token_idx % self.N', 'ids'),
        ('MaskGIT.prepare_batch', '< self.config.label_dropout', '> self.config.label_dropout', 'drop_class'),
        ('MaskGIT.forward', "(nll * batch['weight']).sum()", 'nll.mean()', 'all masked tokens together'),
        ('MaskGIT.forward', ' and self.training', '', 'not in training'),
        ('MaskGIT.forward', "classes.masked_fill(batch['drop_class']", "classes.masked_fill(~batch['drop_class']",
         'in training'),
        ('MaskGIT.forward', 'loss.detach() * B', 'loss.detach()', "logs['loss']"),
        ('MaskGIT.forward', "batch['elbo_weight']", "batch['weight']", "logs['elbo']"),
        ('MaskGIT.forward', 'self.backbone(tokens,', 'self.backbone(tokens.clamp(min=0),', 'the loss'),
        ('unmask_schedule', '1 - torch.cos', 'torch.sin', 'cosine'),
        ('unmask_schedule', '- 1e-9).ceil()', '- 1e-9).floor()', 'cosine'),
        ('unmask_schedule', '.maximum(step)', '', 'cosine'),
        ('unmask_schedule', '.minimum(total - steps + step)', '', 'constant'),
        ('unmask_schedule', '-(-total * step // steps) if', '(total // steps) * step if', 'linear'),
        ('unmask_schedule', '.minimum(total)', '', 'only 2'),
        ('iterative_decode', 'priority = -log_p', 'priority = log_p', 'confidence'),
        ('iterative_decode', 'torch.where(rank < n_new[:, step, None]', 'torch.where(tokens < 0', 'after step'),
        ('iterative_decode', 'sampled, tokens)', 'sampled, -1)', 'have changed'),
        ('iterative_decode', 'torch.where(tokens < 0, priority, torch.inf)', 'priority.expand(tokens.shape)',
         'after step'),
        ('iterative_decode', 'rank < n_new[:, step, None]',
         '(tokens < 0) & (priority.argsort(-1).argsort(-1) < n_new[:, step, None])', 'after step'),
        ('iterative_decode', 'step / max(1, steps - 1)', 'step / steps', 'progress'),
        ('iterative_decode', '(1 - progress) * ', '', 'decays'),
        ('iterative_decode', '.diff(prepend=torch.zeros_like(total))', '', 'after step'),
        ('iterative_decode', 'yield tokens', 'yield sampled', 'given'),
        ('iterative_decode', 'tokens.shape, generator=generator, ', 'tokens.shape, ', 'generator'),
        ('iterative_decode', 'not 1 <= steps <= total.max()', 'False', 'ValueError'),
    ],
    fourm=[
        ('budget_sort_keys', '(rank + 0.5).log() - log_proportions', '(rank + 0.5).log() + log_proportions', 'share'),
        ('budget_sort_keys', '(rank + 0.5).log() - log_proportions', '(rank + 0.5) - log_proportions', 'share'),
        ('budget_sort_keys', '(rank + 0.5)', 'rank.float()', 'next to nothing'),
        ('budget_sort_keys', '.masked_fill(~available, 1)', '', 'share'),
        ('budget_sort_keys', '.masked_fill(~available, torch.inf)', '', 'infinity'),
        ('budget_sort_keys', 'prefix_order[:, m]', 'torch.tensor(False)', 'from the first'),
        ('budget_sort_keys', 'prefix_order[:, m]', 'torch.tensor(True)', 'at random'),
        ('draw_masks', 'budget_sort_keys(rest, ', 'budget_sort_keys(is_token, ', 'both'),
        ('draw_masks', 'torch.where(unconditional, 0, K)', 'K', 'unconditional_prob'),
        ('draw_masks', 'torch.where(full, log_proportions, ', 'torch.where(u < 0, log_proportions, ', 'full_modality_prob'),
        ('draw_masks', '< PREFIX_PROB)', '< 0)', 'prefix'),
        ('draw_masks', 'generator), M, M)', 'generator), M, budget)', 'target slots'),
        ('draw_masks', '~unconditional & (u < config.unconditional_prob + config.full_modality_prob)',
         'u < config.full_modality_prob\n    unconditional = ~full & unconditional', 'without input'),
        ('draw_masks', 'weights[0] = config.first_modality_weight', 'pass', 'first_modality_weight'),
        ('draw_masks', 'torch.where(is_text, config.text_weight, 1.0)', 'torch.ones(n)', 'text_weight'),
        ('draw_masks', 'torch.randint(len(alphas), (2, B), generator=generator)', 'torch.zeros(2, B).long()', 'dirichlet_alphas'),
        ('FourM.encode', 'return rms_norm(x) + pos_embedding', 'return rms_norm(x)', 'position embedding is missing'),
        ('FourM.encode', ' % levels + offset', ' % levels', 'before the blocks'),
        ('FourM.encode', '.sum(-2)', '.mean(-2)', 'before the blocks'),
        ('FourM.encode', 'self.rope_at(position_ids)', 'self.rope_at(torch.arange(ids.size(1)).expand_as(ids))', 'encoder'),
        ('FourM.encode', 'rms_norm(self.embedding(rows).sum(-2) + pos_embedding)', 'self.embedding(rows).sum(-2) + pos_embedding',
         'blocks'),
        ('FourM.decode', 'self.query_embedding', 'self.pos_embedding', 'before the blocks'),
        ('FourM.decode', 'block(x, rope, context, context_rope)', 'block(x, rope, x, rope)', 'context'),
        ('FourM.decode', 'self.rope_at(context_position_ids)', 'self.rope_at(position_ids)', 'line'),
        ('FourM.decode', 'return rms_norm(x)', 'return x', 'outputs'),
        ('target_weights', 'count * n_modalities * count.size(1)', 'count.sum(0).expand_as(count) * count.size(1)', 'the loss'),
        ('target_weights', 'count * n_modalities * count.size(1)', 'count * len(count) * count.size(1)', 'the loss'),
        ('FourM.prepare_batch', 'target_ids[token_idx]', 'target_ids.roll(1)[token_idx]', 'ids_'),
        ('FourM.prepare_batch', 'input_ids=ids.gather(1, inputs)', 'input_ids=inputs', 'input_ids'),
        ('FourM.prepare_batch', 'generator=step_generator', 'generator=generator', 'step_generator'),
        ('FourM.prepare_batch', 'F.pad(value, (0, n_pad))', "F.pad(value, (0, n_pad), value=int(key == 'weight'))", 'weight 0'),
        ('FourM.forward', '(nll * weight).sum()', 'nll.mean() / len(self.modalities)', 'the loss'),
        ('FourM.forward', '(nll * weight).sum()', '(nll * (weight > 0)).sum() / targets.numel()', 'the loss'),
        ('FourM.forward', '.flatten(0, 1)', '.roll(1, 0).flatten(0, 1)', 'the loss'),
        ('FourM.forward', '(nll.detach() * is_target).sum()', 'nll.detach().sum()', 'logs'),
        ('FourM.generate_image', 'min(steps, n_unknown)', 'steps', 'ValueError'),
        ('FourM.generate_image', 'min(steps, n_unknown)', 'n_unknown', 'steps'),
        ('FourM.generate_image', 'ids[:, m.token_slice] = tokens', 'pass', 'in place'),
        ('FourM.generate_image', 'ids[:, m.token_slice] = tokens', 'last = tokens\n            ids[:, m.token_slice] = last',
         'generated before'),
        ('FourM.generate_image', 'n_unknown), order', "n_unknown), 'random'", 'raster'),
        ('FourM.generate_image', ', generator=generator)', ')', 'from the generator'),
        ('FourM.generate', 'self.generate_image(ids,', 'self.generate_image(self.pack_modalities(known),', 'conditions'),
        ('FourM.generate', 'if m.is_text', 'if False', 'generate_text'),
        ('FourM.generate', 'for name in targets]', 'for name in self.batch_keys]', 'in their order'),
        ('FourM.generate', 'for name in targets}', 'for name in self.batch_keys}', 'returns'),
        ('FourM.generate', 'lerp(guidance, guidance_end, progress)', 'guidance', 'guidance'),
        ('FourM.generate', 'lerp(temperature, temperature_end, progress)', 'temperature_end', 'temperature'),
        ('FourM.generate', 'self.sample_tokens(ids,', 'self.sample_tokens(self.pack_modalities(known),', 'being generated'),
    ],
    vlm=[
        ('pixel_shuffle', 'F.pixel_unshuffle(x, factor).flatten(2).transpose(1, 2)',
         'x.flatten(2).transpose(1, 2).reshape(x.size(0), -1, factor ** 2 * x.size(1))', 'square'),
        ('pixel_shuffle', 'x.transpose(1, 2).unflatten(2, (side, side))', 'x.mT.unflatten(2, (side, side)).mT', 'square'),
        ('pixel_shuffle', '.flatten(2)', '.flatten(2).unflatten(1, (-1, factor ** 2)).transpose(1, 2).flatten(1, 2)',
         'the order'),
        ('VLM.encode_images', 'self.projector(x)', 'self.projector(x.flip(1))', 'the embeddings of'),
        ('VLM.encode_images', 'reshape(len(images), -1,', 'reshape(-1, self.tokens_per_image,', '2 images a row'),
        ('VLM.encode_images', 'pixel_shuffle(x, self.config.pixel_shuffle_factor)',
         'x[:, ::self.config.pixel_shuffle_factor ** 2].repeat(1, 1, self.config.pixel_shuffle_factor ** 2)',
         'the embeddings of'),
        ('expand_image_tokens', 'where(is_image, tokens_per_image, 1)', 'where(is_image, tokens_per_image + 1, 1)', 'indices'),
        ('expand_image_tokens', 'where(is_image, tokens_per_image, 1)', 'where(is_image, 1, tokens_per_image)', 'indices'),
        ('expand_image_tokens', '!= n_images', '> n_images', 'ValueError'),
        ('VLM.backbone', 'backbone(tokens, cache, x)', 'backbone(tokens, cache)', 'image_embeds'),
        ('VLM.backbone', 'backbone(tokens, cache, x)', 'backbone(tokens, None, x)', 'cache'),
        ('VLM.backbone', 'tokens == self.config.image_token',
         '(torch.arange(tokens.size(1)) < image_embeds.size(1)).expand(tokens.shape)', 'after two words'),
        ('VLM.backbone', '[..., None], image_embeds, x)', '[..., None], image_embeds + x, x)', 'image'),
        ('VLM.prepare_batch', 'torch.where(loss_mask > 0, tokens, -1)', 'tokens', 'token_idx'),
        ('VLM.prepare_batch', 'tokens, -1)[:, 1:, None]', 'tokens, -1)[:, :-1, None]', 'token_idx'),
        ('VLM.prepare_batch', 'valid.sum((1, 2), keepdim=True).clamp(min=1) / len(tokens)', 'valid.sum()', 'weight'),
        ('VLM.prepare_batch', 'valid.sum((1, 2), keepdim=True)', '(tokens >= 0).sum(1).view(-1, 1, 1)', 'weight'),
        ('VLM.prepare_batch', "batch['loss_mask'].gather(1, idx)",
         "F.pad(batch['loss_mask'], (0, idx.size(1) - batch['loss_mask'].size(1)))", 'token_idx'),
        ('VLM.prepare_batch', 'torch.where(loss_mask > 0, tokens, -1)', 'torch.where(loss_mask > 0, tokens.clamp(min=0), -1)',
         'token_idx'),
        ('VLM.prefill', 'cache.repeat_batch(n_repeat)', 'pass', 'cannot be used'),
        ('VLM.prefill', 'self.backbone(tokens, image_embeds, cache)', 'self.backbone(tokens, None, cache)', 'after reading'),
        ('VLM.prefill', 'left_padded=True', 'left_padded=False', 'after reading'),
        ('VLM.prefill', ' or self.config.text_only', '', 'text_only'),
        ('VLM.step', 'logits[:, self.config.image_token] = -torch.inf', 'pass', 'image'),
        ('VLM.step', 'self.language_model.step(tokens, cache)',
         'self.language_model.logits(self.backbone(tokens)[:, -1])', 'after an image'),
        ('VLM.step', 'self.language_model.step(tokens, cache)',
         'self.language_model.logits(self.backbone(tokens, cache=cache)[:, 0])', 'after an image'),
        ('VLM.stream', 'tokens.size(1) + 1)', 'tokens.size(1))', '11 fit'),
        ('VLM.stream', 'min(max_new_tokens, self.max_seq_len - cache.cur_len - tokens.size(1) + 1)', 'max_new_tokens',
         'out of bounds'),
        ('VLM.stream', 'tokens.size(1) + n - 1', 'tokens.size(1) + n', 'cache.max_len'),
        ('VLM.stream', 'decode(self, tokens', 'decode(self, tokens[:, -1:]', 'should follow'),
        ('VLM.stream', 'decode(self, ', 'decode(self.language_model, ', 'image'),
        ('VLM.stream', 'eos_id, generator)', 'eos_id, None)', 'generator'),
    ],
    flow=[
        ('interpolate', 'noise - data', 'data - noise', 'from data to noise'),
        ('interpolate', '(1 - t) * data + t * noise', 't * data + (1 - t) * noise', 'z at t = 0 '),
        ('interpolate', 't.view(-1, *[1] * (data.ndim - 1))', 't.view(-1, 1, 1, 1)', 'z of vectors'),
        ('sample_timesteps', 'torch.special.ndtri(u).sigmoid()', 'torch.special.ndtri(u)', 'within 0 and 1'),
        ('sample_timesteps', 'torch.special.ndtri(u).sigmoid()', 'u.sigmoid()', 'between 0.25 and 0.75'),
        ('sample_timesteps', 'torch.randperm(n, generator=generator)', 'torch.arange(n)', 'order should be random'),
        ('sample_timesteps', '(torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n',
         'torch.rand(n, generator=generator)', 'parts of equal probability'),
        ('sample_timesteps', 'torch.rand(n, generator=generator)', 'torch.rand(n)', 'from `generator`'),
        ('sample_timesteps', ', timestep_shift)', ', 1)', 'with shift 3'),
        ('flow_matching_loss', 'velocity(z, t', 'velocity(noise, t', 'at t = 0.6'),
        ('flow_matching_loss', 'interpolate(data, noise, t)', 'interpolate(noise, data, t)', 'at t = 0.6'),
        ('flow_matching_loss', '.square()', '.abs()', 'errors'),
        ('flow_matching_loss', '.mean(1)', '.mean()', 'errors'),
        ('flow_matching_loss', 'velocity(z, t, label)', 'velocity(z, t, label).detach()', 'does not require grad'),
        ('Flow.forward', 'if self.training:', 'if True:', 'in evaluation'),
        ('Flow.forward', 'if self.training:', 'if False:', 'in training'),
        ('Flow.forward', 'error.mean()', 'error.sum()', 'the loss'),
        ('Flow.forward', 't_bin == i', 't_bin == 3 - i', 't_0.5_0.75'),
        ('Flow.forward', 'error.detach().where(rows, 0)', 'error.where(rows, 0)', 'logs should be detached'),
        ('Block.forward', '(1 + gate_msa) *', 'gate_msa *', 'with no modulation'),
        ('Block.forward', 'shift_msa, scale_msa, gate_msa,', 'scale_msa, shift_msa, gate_msa,', 'a shift of the attention'),
        ('Block.forward', 'rms_norm(x) * (1 + scale_mlp) + shift_mlp', 'rms_norm(x * (1 + scale_mlp) + shift_mlp)',
         'a shift of the MLP'),
        ('Block.forward', 'rms_norm(x) * (1 + scale_mlp) + shift_mlp', 'rms_norm(x) * scale_mlp + shift_mlp',
         'with no modulation'),
        ('euler', 'z + h', 'z - h', 'after a step'),
        ('euler', 'velocity_fn(z, t)', 'velocity_fn(z, t + h)', 'after a step'),
        ('solve', 't_next - t', 't - t_next', 'the trajectory'),
        ('solve', 'trajectory[-1], t,', 'z, t,', 'the trajectory'),
        ('solve', 'stack(trajectory)', 'stack(trajectory[1:])', 'shape'),
        ('solve', 'evaluations * (len(times) - 1)', 'len(times) - 1', 'by midpoint'),
        ('cfg_velocity', 'uncond + guidance_scale * (cond - uncond)', 'guidance_scale * cond', 'scale 0'),
        ('cfg_velocity', 'uncond + guidance_scale * (cond - uncond)', 'cond + guidance_scale * (cond - uncond)', 'scale 0'),
        ('cfg_velocity', 'cond, uncond =', 'uncond, cond =', 'scale 0'),
        ('cfg_velocity', ' or not guidance_interval[0] <= t <= guidance_interval[1]', '', 'outside of the interval'),
        ('cfg_velocity', 'guidance_interval[0] <= t <= guidance_interval[1]', 'guidance_interval[0] < t < guidance_interval[1]',
         'end of the interval'),
        ('cfg_velocity', 'time.repeat(2)', 'time', 'one time and one label for each'),
        ('cfg_velocity', 'guidance_scale == 1 or ', '', 'scale 1 needs one evaluation'),
    ],
)


# right answers, written otherwise than the solutions: as slowly and plainly as one likes
OTHERWISE = [
    ('gpt', 'Attention.forward', """
        source = x if context is None else context
        a, b = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        q = self.q(x) if context is not None else self.qkv(x)[..., :a]
        k, v = self.qkv(source)[..., -2 * b:-b], self.qkv(source)[..., -b:]
        q, k, v = (y.view(len(x), y.size(1), -1, self.head_dim).permute(0, 2, 1, 3) for y in (q, k, v))
        if self.qk_norm:
            q, k = (y / (y ** 2).mean(-1, keepdim=True).add(1e-6).sqrt() for y in (q, k))
        q, k = apply_rope(q, rope[0], rope[1]), apply_rope(k, *(rope if context is None else context_rope))
        if cache is not None:
            k, v = cache.update(self, k, v)
        k, v = (y.repeat_interleave(q.size(1) // k.size(1), 1) for y in (k, v))
        logits = torch.einsum('bhqd,bhkd->bhqk', q, k) * (12 / self.head_dim if self.qk_norm else self.head_dim ** -0.5)
        if causal:
            logits = logits.masked_fill(torch.ones(x.size(1), x.size(1)).triu(1).bool(), -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        return self.out(torch.einsum('bhqk,bhkd->bqhd', logits.softmax(-1), v).reshape(x.shape))
"""),
    ('maskgit', 'random_mask', """
    mask = torch.zeros_like(valid)
    for b in range(len(valid)):
        candidates = sorted(valid[b].nonzero()[:, 0].tolist(), key=lambda i: noise[b, i])
        ratio = float(MASK_SCHEDULES[mask_schedule][0](u[b, 0]))
        mask[b, candidates[:max(1, math.ceil(ratio * len(candidates) - 1e-6))]] = True
    return mask
"""),
    ('fourm', 'FourM.encode', """
        m, positions = self.modality_of[position_ids], self.pos_embedding(position_ids)
        x = positions.clone()
        for divisor, levels, offset in zip(*self.digit_table[m].permute(3, 2, 0, 1)):
            x += self.embedding(ids // divisor % levels + offset)
        x = rms_norm(x)
        for block in self.encoder:
            x = block(x, self.rope_at(position_ids))
        return positions + rms_norm(x)
"""),
    ('flow', 'sample_timesteps', """
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    u = u[torch.randperm(n, generator=generator)].clamp(1e-6, 1 - 1e-6)
    t = u if timestep_sampling == 'uniform' else 1 / (1 + torch.exp(-2 ** 0.5 * torch.erfinv(2 * u - 1)))
    return shift_timesteps(t, timestep_shift)
"""),
    ('vlm', 'pixel_shuffle', """
    n = round(x.size(1) ** 0.5) // factor
    x = x.view(len(x), n, factor, n, factor, x.size(2)).permute(0, 1, 3, 5, 2, 4)
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
    text = source('flow')[:start] + source('flow')[source('flow').index('def cfg_velocity('):]
    assert attempt('flow', 'euler', text).startswith('flow.py has no function euler any more')
    assert attempt('flow', 'solve', text) == ''


def test_a_homework_never_overwrites(tmp_path, capsys):
    out = tmp_path / 'homework'
    homework.main('fourm', f'--out={out}')
    assert 'budget_sort_keys, draw_masks, FourM.encode' in capsys.readouterr().out
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
    assert done.returncode == 0 and not done.stderr and done.stdout.count(' passed') == 9
    assert done.stdout.endswith('20 of 20 points, 8 of 8 exercises passed\n')


EULER = 'return z + h * velocity_fn(z, t)'


@pytest.mark.parametrize('old, new, words', [
    (EULER, 'return z + h * velocity_fn(z, t', "flow.py, line {}: '(' was never closed"),
    (EULER, 'if h > 0: pass\n  return z', 'unindent does not match'),
    (EULER, 'return z * undefined', "flow.py, line {}: NameError: name 'undefined' is not defined"),
    (EULER, 'import sys; sys.exit(0)', 'flow.py, line {}: SystemExit: 0'),
    (EULER, 'pass', homework.BLANK),
    (EULER, 'print(z)', 'should be a tensor, but is NoneType'),
    (EULER, 'assert h > 0', 'flow.py, line {}: AssertionError'),
    (EULER, 'return euler(velocity_fn, z, t, h)', 'flow.py, line {}: RecursionError'),
    (EULER, 'return my_step(velocity_fn, z, t, h)\n\n\ndef my_step(velocity_fn, z, t, h):\n    return z + h * velocity_fn(z, t)', ''),
    (EULER, 'raise NotImplementedError("exercise euler: mine"); return z', 'flow.py, line {}: NotImplementedError'),
    ('def euler(velocity_fn, z, t, h)', 'def euler(velocity_fn, z, t)', 'euler cannot be used as it is: TypeError: euler() takes'),
    ('def euler(', 'def eule(', 'flow.py has no function euler any more'),
    ('import math\n', 'from __future__ import annotations\nimport math\n', ''),
    ('import math\n', 'import math, no_such_package\n', 'flow.py, line {}: ModuleNotFoundError: No module named '),
    ('import math\n', 'exit()\n', 'flow.py, line {}: SystemExit'),
    ('import math\n', '\0', 'source code string cannot contain null bytes'),
    (None, '', 'flow.py is not flow.py: it does not have its exercises'),
    (None, source('gpt'), 'flow.py is not flow.py'),
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
    assert '19 of 20 points, 7 of 8 exercises passed' in out and 'noise' not in out + err
    assert words.format(line) in ' '.join(out.split()), out


def test_nothing_is_compiled(tmp_path):
    """It would take longer than the limit; this compiler fails at once."""
    text = source('flow').replace('def euler(', '@torch.compile(backend=lambda *_: 1 / 0)\ndef euler(')
    assert homework.judge('flow', 'euler', text, tmp_path / 'flow.py', 30) == ''


def test_a_file_that_cannot_be_read_has_one_reason(tmp_path, capsys):
    path = tmp_path / 'mine.py'
    path.write_text('def')
    assert homework.main('flow', grade=str(path)) == 8
    out = capsys.readouterr().out
    assert out.count('mine.py, line 1: invalid syntax; nothing can be graded') == 1 and out.count('failed: as above') == 7


@pytest.mark.parametrize('arguments, message', [
    ([], 'say one of --exercises, --out=FOLDER'),
    (['gpt'], 'say one of'),
    (['gpt', '--out=a', '--grade=b'], 'say one of'),
    (['--out=a'], 'which chapter\\? name one of gpt, maskgit, fourm, flow, vlm'),
    (['forum', '--exercises'], "there is no chapter 'forum': name one of .*; did you mean fourm?"),
    (['gpt', '--grades=a'], "unknown setting 'grades'; did you mean 'grade'"),
    (['gpt', '--grade=no/such'], '--grade takes the folder that gpt.py is in, or the file itself'),
    (['gpt', f'--grade={ROOT}/README.md'], 'README.md: no such Python file; --grade takes'),
    (['gpt', '--grade=a', '--limit=-1'], 'limit=-1.0: must be at least 1'),
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
