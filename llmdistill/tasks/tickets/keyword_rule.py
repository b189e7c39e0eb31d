"""The rule that a careful person writes in an afternoon: words and phrases that point to each intent, the most points win.

It is here to show that the task is not one of spotting words; the test suite holds its accuracy below 75%. The phrases come from what the ten intents mean and
from reading training messages, never from the test split. What a message denies up to the next comma ("I don't need a refund, ...") does not count.
"""

from __future__ import annotations

import re

# Phrases are regular expressions at word boundaries; a phrase that is nearly sure counts 3, a good hint 2, a weak one 1. Ties go to the intent listed first.
_POINTS: dict[str, dict[int, str]] = {
    "account_access": {
        3: (
            r"pass ?word|log ?in|sign ?in|logging in|signing in|signed in|locked|verification|hacked|get into my account|"
            r"log on|reset (?:link|mail|e-?mail|code)"
        ),
        2: (
            r"two.?factor|authenticator|old (?:number|phone|e-?mail)|get (?:back )?in|let me in|let me back|security question|"
            r"six.digit|recover\w*|acc?ount"
        ),
        1: r"code|e-?mail|phone|reset|someone",
    },
    "billing_problem": {
        3: r"charged|charges?|invoices?|bill|billed|bills|declined|promo\w*|discount code|voucher|coupon|over-?charged|receipt|vat|statement",
        2: r"twice|payments?|card|bank|price|discount|amount|took|gift card|paid (?:too|two|\d+)|tax",
        1: r"pay|paid|cost|code|fee|money|double|total",
    },
    "return_refund": {
        3: (
            r"returns?|returned|returning|refund\w*|exchang\w*|sen[dt] (?:it|them|this|these|the \w+) back|money back|"
            r"give (?:it|them) back|return label"
        ),
        2: r"too (?:big|small|tight|large|long|short|loose)|fits?|suits?|(?:bigger|smaller|next|larger) size|unworn|unopened|unused|postage|swap",
        1: r"back|size|like|label",
    },
    "wrong_or_damaged": {
        3: (
            r"broken|crack\w*|damag\w*|shatter\w*|smashed|torn|dent\w*|incomplete|wrong (?:item|one|thing|model|parcel)|"
            r"in pieces|faulty|defective|dead on arrival"
        ),
        2: (
            r"opened|missing|scratch\w*|leak\w*|stain\w*|chipped|bent|ripped|hole|i asked for|i ordered|but (?:i )?(?:got|received)|"
            r"turned up|wrong|inside|instead"
        ),
        1: r"arrived|came|got|received|sent|box",
    },
    "delivery_status": {
        3: (
            r"where(?:'s| is| are)|track\w*|courier|(?:not|hasn't|haven't|never|didn't) (?:yet )?(?:come|came|arrived?|turned up|shown up)|"
            r"says delivered|no sign of|still waiting"
        ),
        2: (
            r"parcel|package|late|delay\w*|supposed to|in transit|driver|neighbou?rs?|out for delivery|depot|was due|"
            r"how long until|any news|when (?:will|does|is)"
        ),
        1: r"deliver\w*|arriv\w*|days|weeks?|waiting|shipp\w*|when|still",
    },
    "cancel_subscription": {
        3: (
            r"subscri\w+|memberships?|unsubscribe|auto-?renew\w*|renewals?|trial|close (?:my|the|our) account|delete (?:my|our) account|"
            r"account closed"
        ),
        2: r"renew\w*|monthly|yearly|annual|next year|plan|club|pass|for good|every month|each month",
        1: r"cancel\w*|end|stop|pause|premium|no longer",
    },
    "cancel_order": {
        3: (
            r"cancel (?:my |the |this |that |our )?(?:\w+ )?order|stop (?:my|the|this) order|call off|"
            r"call it off|(?:withdraw|drop|scrap) (?:my|the) (?:whole )?order"
        ),
        2: r"cancel\w*|changed my mind|no longer (?:need|want)\w*|by mistake|by accident|ordered|forget it|before it (?:ships|goes|leaves)|packed",
        1: r"order|stop|unshipped|placed",
    },
    "change_order": {
        3: (
            r"chang(?:e|ing) (?:\w+ ){0,2}(?:address|size|colou?r|quantity|order|name|date)|(?:different|new|wrong|old|another|delivery) address|"
            r"(?:add|remove) .{1,40}order"
        ),
        2: r"chang\w*|switch\w*|swap|update|amend|alter|edit|make (?:it|that)|engrav\w*|add|rather than|move|instead",
        1: r"order|address|colou?r|deliver\w*|before (?:it|you) (?:ships?|posts?|sends?)|size",
    },
    "technical_problem": {
        3: (
            r"app|crash\w*|freez\w*|froze|sync\w*|bluetooth|firmware|wi-?fi|error|loading|button|screen|won't (?:turn on|connect|load|charge|start|pair|open)|"
            r"pair"
        ),
        2: (
            r"update|site|web ?site|page|browser|blank|checkout|stopped working|not working|connect\w*|battery|bug|"
            r"glitch\w*|for a year|last year|years?|restart\w*|reinstall\w*"
        ),
        1: r"work\w*|tried|does nothing|speaker|video",
    },
    "product_question": {
        3: (
            r"in stock|do you (?:have|sell|stock|ship|offer|make|also)|before i (?:buy|order|pay)|compatible|come in|"
            r"comes? with|haven't ordered|if i (?:buy|order)|whether the"
        ),
        2: (
            r"would (?:the|it|this)|does (?:the|it|this|your)|is (?:the|it|there|this)|are (?:the|these|there|your)|"
            r"how (?:big|long|heavy|wide|tall|much|many)|which|made of|wonder\w*"
        ),
        1: r"fit|will|available|what|material|suitable|gift|looking for|shipping|can (?:the|it|i|you)",
    },
}
_PATTERNS = {intent: [(points, re.compile(rf"\b(?:{phrases})\b")) for points, phrases in levels.items()] for intent, levels in _POINTS.items()}
_DENIED = re.compile(
    r"\b(?:i don't (?:want|need)|i do not (?:want|need)|i'm not|it's not|not|no need|never mind|don't|isn't)\b[^,.;:!?]*(?:,| but | only | just )"
)


def keyword_rule(message: str) -> str:
    """The intent whose phrases collect the most points; a message without any is taken for a question."""
    text = _DENIED.sub(" ", message.lower())
    scores = {intent: sum(points * len(set(pattern.findall(text))) for points, pattern in patterns) for intent, patterns in _PATTERNS.items()}
    best = max(scores, key=lambda intent: scores[intent])
    return best if scores[best] > 0 else "product_question"
