/* A listener: prints each broadcast, the whole message on one line.
 *
 *     listener CONFIG
 *
 * It ends by SIGTERM or SIGINT, without a word to anybody: the coordinator buries it, which costs nothing where nothing is
 * claimed (L6).
 */
#include "namedpipe.h"

int main(int count, char **arguments)
{
    static struct reader broadcasts, answers;
    char name[128];
    if (count < 2)
        die("usage: listener CONFIG");
    find_directories(arguments[1]);
    lock_id();
    sprintf(name, "broadcast_%s", worker_id);
    read_from(&answers, reply);
    read_from(&broadcasts, name);
    char *intake = text_of("%s/coordinator_broadcast", pipes);
    open(intake, O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC); /* B2: what lies in it outlives the coordinator */
    long long from = now();
    char *since = text_of(",\"broadcast\":true,\"listens_since\":%lld.%09lld", from / 1000000000, from % 1000000000);
    come(since);
    free(intake), free(since);
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        char *message = next(&broadcasts, -1);
        if (message)
            printf("%s\n", one_line(message)), fflush(stdout);
        free(message);
    }
}
