"""Chats: the template's text of a conversation, and which of its tokens the model would generate.

    conversation -> template (rendered, traced) -> boundaries -> token ids and loss mask

`encoder` joins the parts. Everything here runs in the tokenising processes.
"""
