/* A sender: sends tasks to the default queue, and prints their outcomes in the order in which they come.
 *
 *     sender CONFIG JSON...
 *
 * It exits with 0 once each task has an outcome.
 */
#include "namedpipe.h"

static void send_task(const char *body, int number)
{
    static long long last;
    char hex[33], name[80];
    new_hex(hex);
    long long time = now();
    last = time > last ? time : last + 1; /* T1: each greater than the last */
    sprintf(name, "%020lld-%.8s", last, hex);
    char *draft = text_of("%s/.%s", queue, name), *path = text_of("%s/task_%s.json", queue, name);
    char *text = text_of("{\"body\":%s,\"no_reply\":false,\"reply_to\":\"%s\",\"correlation_id\":\"%x\"}", body, reply, number);
    char *ring = text_of("{\"type\":\"task\",\"queue\":\"\",\"name\":\"%s\"}", name);
    write_file(draft, text, 1); /* T2; F5: what is ours stands last */
    if (rename(draft, path))
        die("%s: %s", path, strerror(errno));
    tell("coordinator_tasks", ring); /* T3, P6 */
    int directory = open(queue, O_RDONLY | O_DIRECTORY);
    if (directory < 0 || fsync(directory)) {
        int problem = errno;
        if (!unlink(path)) /* T4: nobody has claimed it, and it will not be done */
            die("%s: %s", queue, strerror(problem));
    }
    close(directory); /* from here on it is done, whatever happens */
    free(draft), free(path), free(text), free(ring);
}

static int take(char *message, char *waits, int count) /* say whether one more has its outcome */
{
    const char *kinds[] = {"result", "exception", "cancelled", "undelivered"}; /* section 9; "pending" is none yet */
    char *id = plain(field(message, "correlation_id"));
    long number = id ? strtol(id, NULL, 16) : -1;
    int ended = 0;
    for (int i = 0; i < 4 && number >= 0 && number < count && waits[number]; i++) {
        char *value = field(message, kinds[i]);
        if (value) {
            printf("%s: %s\n", kinds[i], one_line(value));
            fflush(stdout);
            waits[number] = 0; /* T5: it may come twice */
            ended = 1;
        }
        free(value);
    }
    free(id), free(message);
    return ended;
}

int main(int count, char **arguments)
{
    static struct reader answers;
    if (count < 3)
        die("usage: sender CONFIG JSON...");
    int left = count - 2;
    char *waits = malloc(left);
    memset(waits, 1, left);
    find_directories(arguments[1]);
    read_from(&answers, reply);
    for (int i = 0; i < count - 2; i++)
        send_task(arguments[i + 2], i);
    while (left > 0) {
        char *message = next(&answers, 1000);
        if (message)
            left -= take(message, waits, count - 2);
        if (is_time_to_look()) /* M4: those whose doorbell was lost */
            while ((message = next_body(&answers)))
                left -= take(message, waits, count - 2);
    }
    char *path = text_of("%s/%s", pipes, reply);
    unlink(path);
    free(path), free(waits);
    return 0;
}
