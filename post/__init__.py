"""
post: what post-training needs besides its commands.

    pack     many documents in one row        tasks    verifiable problems
    rollout  many replies at once             rlhf     rewards from a judge's comparisons
    picture  what a run answers               release  what others need to chat the same way

Not here  the lessons and commands: chat.py, sft.py, grpo.py, heal.py at the top
"""
