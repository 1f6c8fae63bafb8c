"""The lookahead reward for another trainer's batch: copy lgr.py and logprobs.py beside this file.

Any two Hugging Face causal LMs with one tokenizer; ids and masks in, rewards out. Add
gamma * reward to the advantage of every token (arXiv 2605.30833; gamma = 1 in the paper).
"""

import torch

import lgr
import logprobs


@torch.no_grad()
def lookahead_reward(
    student, teacher, ids_BT, attention_mask_BT, response_mask_BT, *, tau=0.2, top_k=8, **how
):
    """The group reward [B, T] of every sampled token; 0 where the student does not hesitate, or
    where it sampled a token outside its top K.

    ids_BT: prompts and responses, padded on either side. attention_mask_BT: 1 on tokens, 0 on
    padding. response_mask_BT: 1 on response tokens, stop token included.
    tau: least entropy of the student, nats. how: as in `lgr.lookahead_confidence`.
    Both models in eval mode, the teacher with attention "sdpa" or "eager".
    """
    order_BT = attention_mask_BT.long().argsort(dim=1, descending=True, stable=True)  # to the left
    ids_BT, mask_BT = ids_BT.gather(1, order_BT), response_mask_BT.bool().gather(1, order_BT)
    hidden_BTD = student.base_model(input_ids=ids_BT, use_cache=False)[0]
    head_VD = student.get_output_embeddings().weight
    stats = logprobs.token_stats(hidden_BTD, head_VD, ids_BT, top_k=top_k, mask_BT=mask_BT)
    trigger_BT, group_BTK = lgr.trigger(stats.entropy_BT, mask_BT, tau), stats.topk_ids_BTK
    confidence_BTK = lgr.lookahead_confidence(
        teacher, ids_BT, mask_BT, trigger_BT, group_BTK, **how
    )
    reward_BT = lgr.sampled_reward(lgr.group_reward(confidence_BTK), group_BTK, ids_BT)
    return torch.zeros_like(reward_BT).scatter(1, order_BT, reward_BT)
