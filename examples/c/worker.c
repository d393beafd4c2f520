/* A worker: does the tasks of the default queue, each with its own body as its result.
 *
 *     worker CONFIG [SECONDS]
 *
 * CONFIG is the profile's directory; a task takes SECONDS. It prints how each body begins, and ends by SIGTERM or SIGINT
 * when nothing is in its hands.
 */
#include "namedpipe.h"

static int is_paused(void) /* W3 */
{
    struct stat status;
    char *mark = text_of("%s/paused", queue);
    int found = !lstat(mark, &status);
    free(mark);
    return found;
}

static void report(const char *became, const char *name) /* R3, R4 */
{
    char *text = text_of("{\"type\":\"report\",\"worker\":\"%s\",\"reply\":\"%s\",\"queue\":\"\",\"%s\":[\"%s\"]}", worker_id,
                         reply, became, name);
    tell("coordinator_tasks", text);
    free(text);
}

static void move(const char *from, const char *to)
{
    if (rename(from, to))
        die("%s: %s", to, strerror(errno));
}

/* W4, W5; `reason` is kept beside it */
static void settle(const char *ours, const char *state, const char *name, const char *reason)
{
    char *directory = text_of("%s/%s", queue, state), *settled = text_of("%s/task_%s.json", directory, name);
    char *beside = text_of("task_%s.reason", name);
    mkdir(directory, 0700); /* it is there, but for somebody who has tidied up */
    if (reason)
        put(directory, beside, reason);
    move(ours, settled);
    free(directory), free(settled), free(beside);
}

static const char *work(const char *name, int seconds) /* what the report says of it */
{
    char *waiting = text_of("%s/task_%s.json", queue, name), *message = NULL, *body = NULL;
    char *ours = text_of("%s/claimed/%s/task_%s.json", queue, worker_id, name);
    const char *became = "lost";
    if (is_paused())
        goto done;
    if (rename(waiting, ours)) { /* W2: somebody else has it */
        char *lock = text_of("%s/claimed/%s/lock", queue, worker_id);
        if (access(lock, F_OK)) /* or our claims are gone, and our life with them (L7) */
            die("%s: %s", lock, strerror(errno));
        free(lock);
        goto done;
    }
    if (is_paused()) {
        move(ours, waiting); /* W6 */
        became = "returned";
        goto done;
    }
    became = "done";
    message = read_file(ours);
    if (!message || !(body = field(message, "body"))) { /* W4 */
        if (message)
            answer(message, "exception", "\"it is no JSON object with a body\"");
        settle(ours, "failed", name, "it is no JSON object with a body");
        goto done;
    }
    if (seconds)
        report("claimed", name); /* R4 */
    for (int left = seconds; left; left = sleep(left))
        ;
    printf("%.60s\n", one_line(body));
    fflush(stdout);
    answer(message, "result", body); /* W5: its outcome first */
    settle(ours, "completed", name, NULL);
done:
    free(waiting), free(ours), free(message), free(body);
    return became;
}

static int is_name(const char *name) /* a task's, {id} or {id}.{deaths}: it is to be in a path */
{
    size_t id = strspn(name, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz-"); /* T1 */
    const char *deaths = name[id] == '.' ? name + id + 1 : "0";
    return id && id <= 80 && (!name[id] || name[id] == '.') && *deaths && !deaths[strspn(deaths, "0123456789")];
}

static void rung(const char *names, int seconds) /* ["name", ...] */
{
    for (const char *at = names + 1; (at = strchr(at, '"'));) {
        const char *after = skip_text(at);
        char *name = after ? plain(strndup(at, after - at)) : NULL;
        if (!name)
            return;
        if (is_name(name))
            report(work(name, seconds), name);
        free(name);
        at = after;
    }
}

int main(int count, char **arguments)
{
    static struct reader rings, answers;
    char name[128];
    if (count < 2)
        die("usage: worker CONFIG [SECONDS]");
    int seconds = count > 2 ? atoi(arguments[2]) : 0;
    end_by_signals();
    find_directories(arguments[1]);
    lock_id();
    sprintf(name, "task_%s", worker_id);
    read_from(&answers, reply);
    read_from(&rings, name);
    come(",\"queues\":{\"\":1}"); /* one at a time */
    printf("ready\n");
    fflush(stdout);
    while (!is_over()) {
        char *message = next(&rings, -1);
        char *names = message ? field(message, "names") : NULL;
        if (names && *names == '[')
            rung(names, seconds);
        free(message), free(names);
    }
    leave(name);
    return 0;
}
