"""The orders in which comparisons are worth judging, as SQL: each gives (comparison, priority), the smallest first.

Comparisons that an order says nothing about come last.
"""

# Each two of up to five answers, by their places in a list.
PLACES = """(VALUES (1, 2), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)) places(i, j)"""

# A judge's newest verdict counts.
NEWEST_VERDICTS = """SELECT * FROM verdicts
    QUALIFY row_number() OVER (PARTITION BY comparison, judge ORDER BY number DESC) = 1"""

# By how little the policy prefers one answer, as the model that scored last says.
MARGINS = """SELECT comparison, arg_max(margin, moment) AS margin FROM scores
    WHERE model = (SELECT arg_max(model, moment) FROM scores) GROUP BY comparison"""
UNCERTAIN = f"SELECT comparison, abs(margin) AS priority FROM ({MARGINS})"

# By the probability that the label is wrong, as training found it last.
FLIPPED = """SELECT comparison, -arg_max(probability, moment) AS priority FROM flip_probabilities GROUP BY comparison"""

# By how much people and judges disagree: whoever judges says of each two answers which is better, as a sign; priority is the
# variance of these signs, in the mean of all two answers, below 0. A settled comparison is none of them.
DISPUTED = f"""SELECT comparison, -avg(spread) AS priority
    FROM (
        SELECT comparison, i, j, var_pop(coalesce(sign(ranks[i] - ranks[j]), 0)) AS spread
        FROM (
            SELECT comparison, ranks FROM standing WHERE choice <> 'skip'
            UNION ALL SELECT comparison, ranks FROM ({NEWEST_VERDICTS})) said
        JOIN comparisons ON comparisons.id = said.comparison JOIN {PLACES} ON j <= len(answers)
        WHERE comparison NOT IN (SELECT comparison FROM standing WHERE settles)
        GROUP BY comparison, i, j HAVING count(*) > 1)
    GROUP BY comparison"""

# Comparisons on which labelers disagree: they chose differently (one ranks the answers where another finds a tie or all bad),
# or rank some two answers in opposite order. What was settled is no disagreement any more.
DISAGREEMENTS = f"""SELECT comparison FROM standing WHERE choice <> 'skip' GROUP BY comparison
    HAVING NOT bool_or(settles) AND (count(DISTINCT choice) > 1 OR comparison IN (
        SELECT comparison FROM standing, {PLACES} WHERE j <= len(ranks) GROUP BY comparison, i, j
        HAVING min(sign(ranks[i] - ranks[j])) < 0 AND max(sign(ranks[i] - ranks[j])) > 0))"""
