from unmask.router.origins import ALARM_S, FORGET_S, Origins


def test_a_new_sign_is_told_once_and_the_first_one_is_none() -> None:
    origins = Origins()
    assert [origins.add(sign, now) for now, sign in enumerate("aaabbba")] == [False] * 3 + [True] + [False] * 3


def test_two_servers_behind_one_address_are_known_after_a_round() -> None:
    origins = Origins()
    assert [origins.add("ab"[now % 2], now) for now in range(6)] == [False, True, False, False, False, False]


def test_a_sign_that_comes_back_after_an_hour_is_new() -> None:
    origins = Origins()
    origins.add("a", 0)
    assert origins.add("b", 1)
    assert not origins.add("b", FORGET_S)  # the same server, however long nobody asked it
    assert origins.add("a", FORGET_S + 1)


def test_a_provider_with_a_sign_for_each_answer_causes_few_alarms_and_the_last_sign_is_not_forgotten() -> None:
    origins = Origins()
    alarms = [now for now in range(int(2 * ALARM_S)) if origins.add(f"sign {now}", now)]
    assert alarms == [1, 1 + ALARM_S] and len(origins._seen_at) <= 16
    last = f"sign {int(2 * ALARM_S) - 1}"
    assert not origins.add(last, 2 * ALARM_S) and origins.add(last, 1 + 2 * ALARM_S)
