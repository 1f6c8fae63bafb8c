"""The release rule inside TRL's DistillationTrainer (1.16): copy release_rule.py, teachability.py,
masks.py and logprobs.py beside this file, and use ReleaseTrainer in its place.

TRL multiplies its loss mask by `tool_mask` and divides the loss by `num_items_in_batch`: the rule
marks what is released and counts what is kept. It costs a forward of the student and one of the
teacher per batch, since TRL keeps no log-probs of sampling.
"""

import torch
from trl import DistillationTrainer

import logprobs
import masks
import teachability


class ReleaseTrainer(DistillationTrainer):
    """Supervises every completion up to the drop of its teacher margin (arXiv 2605.13643)."""

    candidates = 4  # the paper's K; do not call it top_k, which TRL has
    rule = {}  # keywords of masks.release, such as min_segments

    @torch.no_grad()
    def read(self, model, ids_BT, attention_mask_BT, response_mask_BT, **what):
        """What a model says of a batch: `logprobs.TokenStats`."""
        model = self.accelerator.unwrap_model(model)
        hidden_BTD = model.base_model(
            input_ids=ids_BT, attention_mask=attention_mask_BT, use_cache=False
        )[0]
        head_VD, vocab_size = model.get_output_embeddings().weight, len(self.processing_class)
        return logprobs.token_stats(
            hidden_BTD, head_VD, ids_BT, mask_BT=response_mask_BT, vocab_size=vocab_size, **what
        )

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        ids_BT = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
        attention_mask_BT = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
        start, response_mask_BT = out["prompt_ids"].shape[1], attention_mask_BT.bool()
        response_mask_BT[:, :start] = False
        batch = ids_BT, attention_mask_BT, response_mask_BT
        student = self.read(self.model, *batch, top_k=self.candidates)
        teacher = self.read(self.teacher_model, *batch, candidates_BTK=student.topk_ids_BTK)
        rows = zip(ids_BT.cpu(), response_mask_BT.cpu(), strict=True)
        segments = [teachability.token_segments(self.processing_class, i[m]) for i, m in rows]
        keep_BT = masks.release(
            response_mask_BT, teacher.candidate_logp_BTK, segments, student.entropy_BT, **self.rule
        ).keep_BT
        out["tool_mask"] = keep_BT[:, start:].long()
        out["num_items_in_batch"] = self.accelerator.gather(keep_BT.sum()).sum()
        return out
