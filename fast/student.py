"""The forward of training, with the plain or the faster head."""

import torch

import fast.head
import logprobs


class StudentLogProbs(torch.nn.Module):
    """The student's forward as training needs it: ids in, log-probs or divergences out.
    DDP hooks the forward of what it wraps, so backbone and chunked head must both be in here.
    """

    def __init__(self, model, args, vocab_size: int, teacher_head_VE=None, stop_class=None):
        super().__init__()
        self.model, self.teacher_head_VE, self.fast = model, [teacher_head_VE], args.fast == "on"
        self.divergence = {"kind": args.objective, "beta": args.jsd_beta}
        self.how = dict(vocab_size=vocab_size, temperature=args.temperature, stop_class=stop_class)

    def forward(self, ids_BT, mask_BT, candidates_BTK=None, *, teacher=None, scale_BT=None):
        """Log-probs [B, T] of the tokens, or [B, T, K] of candidates in their places, nats at the
        sampling temperature; with `teacher`, its hidden states, the divergence [B, T] from it. 0
        outside `mask_BT`. scale_BT: what the loss will multiply the result by, if that is known."""
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False)[0]
        head_VD = self.model.get_output_embeddings().weight
        head, how = (fast.head, {"scale_BT": scale_BT}) if self.fast else (logprobs, {})
        how |= self.how | {"mask_BT": mask_BT}
        if teacher is not None:
            teacher = teacher, self.teacher_head_VE[0]  # in a list: not a module's own parameter
            return head.token_divergence(hidden_BTD, head_VD, *teacher, **self.divergence, **how)
        how |= {"candidates_BTK": candidates_BTK}
        return head.token_logprobs(hidden_BTD, head_VD, ids_BT, **how)
